"""`coxswain serve MODEL` with flags of `vllm serve` and no file: a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.models import make_model
from tests.server.live import Server

pytestmark = pytest.mark.engine

KEY = "clé-ß"
PAGE = "http://localhost:3000"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tone }}:"
END_OF_REASONING = 5
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "enum": [1, 2]}},
    "required": ["x"],
    "additionalProperties": False,
}


def _thinking(folder: Path) -> None:
    """Gives the tokenizer the tokens that reasoning stands between, ids 4 and 5."""
    for file in folder.glob("*token*.json"):
        text = file.read_text(encoding="utf-8")
        text = text.replace("<|user|>", "<think>").replace("<|assistant|>", "</think>")
        file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("flags")
    base = folder / "hidden-folder" / "weights"
    make_model(base, "llama", seed=1)
    _thinking(base)
    (folder / "chat.jinja").write_text(TEMPLATE)
    found = Server(
        folder, {}, model=str(base), flags=(
            "--served-model-name", "big", "gpt", "org/big", "--api-key", KEY,
            "--chat-template", str(folder / "chat.jinja"),
            "--default-chat-template-kwargs", '{"tone": "quietly and at some length"}',
            "--tool-call-parser", "hermes", "--enable-auto-tool-choice",
            "--reasoning-parser", "deepseek_r1", "--root-path", "/llm", "--admin-port", "0",
            "--allowed-origins", json.dumps([PAGE]), "--max-log-len", "5",
            "--max-model-len", "256", "--dtype", "float32", "--enforce-eager",
            "--kv-cache-memory-bytes", str(1 << 27), "--max-num-seqs", "4", "--max-loras", "2",
            "--structured-outputs-config.disable_any_whitespace", "true",
        ), environ={"XDG_STATE_HOME": str(folder / "state")},
    )  # fmt: skip
    found.wait_ready()
    yield found
    found.stop()


def headers(key: str = KEY, encoding: str = "utf-8") -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode(encoding)}


def ask(server: Server, **body: object) -> dict[str, object]:
    asked = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, **body}
    answer = server.post("/v1/chat/completions", asked, headers=headers())
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


@pytest.mark.parametrize("name", ["big", "gpt", "org/big"])
def test_every_name_is_the_base(server: Server, name: str) -> None:
    assert ask(server, model=name, max_tokens=2)["model"] == "big"
    shown = server.get(f"/v1/models/{name}", headers=headers())
    assert shown.status_code == (404 if "/" in name else 200) or shown.json()["id"] == name


def test_names_are_listed_and_others_are_refused(server: Server) -> None:
    models = server.get("/v1/models", headers=headers()).json()["data"]
    assert [model["id"] for model in models] == ["big", "gpt", "org/big"]
    answer = server.post("/v1/completions", {"model": "gone", "prompt": "x"}, headers=headers())
    assert answer.status_code == 404


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_outside_ascii_opens(server: Server, encoding: str) -> None:
    assert server.get("/v1/models", headers=headers(encoding=encoding)).status_code == 200
    assert server.get("/v1/models", headers=headers("cle-ss")).status_code == 401


def test_the_path_of_the_base_is_nowhere(server: Server) -> None:
    ask(server, model="big", max_tokens=2)
    series = server.get("/metrics").text
    assert 'model_name="big"' in series
    for text in (series, server.get("/v1/models", headers=headers()).text,
                 server.get("/openapi.json").text):  # fmt: skip
        assert "hidden-folder" not in text


def test_a_schema_lands_in_the_content(server: Server) -> None:
    """The engine begins the grammar where the front end sees the reasoning's end."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    found = ask(server, max_tokens=40, response_format=schema,
                # The tiny tokenizer's words for thinking are special tokens.
                skip_special_tokens=False,
                logit_bias={str(END_OF_REASONING): 100})  # fmt: skip
    message = found["choices"][0]["message"]  # type: ignore[index]
    assert json.loads(message["content"])["x"] in (1, 2)


def test_template_defaults_hold_until_a_request_says_otherwise(server: Server) -> None:
    def count(**more: object) -> int:
        body = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}], **more}
        answer = server.post("/tokenize", body, headers=headers())
        assert answer.status_code == 200, answer.text
        return int(answer.json()["count"])

    assert count() > count(chat_template_kwargs={"tone": "x"}) + 3


def test_a_browser_may_ask(server: Server) -> None:
    asked = server.get("/llm/v1/models", headers={b"origin": PAGE.encode(), **headers()})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE


def test_adapters_can_be_loaded(server: Server) -> None:
    """The admin API is local, the registry embedded."""
    log = server.log.read_text()
    (admin,) = re.findall(r"^ +admin +(http://127\.0\.0\.1:\d+)$", log, re.MULTILINE)
    found = httpx.get(f"{admin}/admin/adapters").json()
    assert found["adapters"] == [] and found["engine"]["slots"] == 2
    assert server.get("/admin/adapters", headers={}).status_code == 404
    assert "--max-log-len has no effect" in log
