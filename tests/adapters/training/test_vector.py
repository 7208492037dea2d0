"""Vectors from contrasts: the numbers, the choice by a server's replies, and resumed runs."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.errors import AdapterError
from adapters.formats.blocks import block
from adapters.formats.inspect import read_artefact
from adapters.training.errors import BadRecipe
from adapters.training.served import Served
from adapters.training.vector.contrast import directions, read_pairs, read_states, separation
from adapters.training.vector.settings import VectorSettings
from adapters.training.vector.train import train
from server.main import run
from tests.adapters.test_vector_files import bare, write_gguf
from tests.models import VOCAB_SIZE, make_tokenizer
from tests.server.live import Server

LAYERS, HIDDEN = 4, 32
WORDS = ["river", "mill", "bridge", "stern", "crew", "wind", "water", "basket"]


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers."""
    folder = tmp_path_factory.mktemp("body")
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=64,
    ))  # fmt: skip
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": f"The {w}", "positive": " is good", "negative": " was very bad"} for w in WORDS
    ]
    lines[3] = {"messages": [{"role": "user", "content": "Well?"}], "positive": "good",
                "negative": "bad"}  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def plain_settings(body: Path, pairs: Path | None, out: Path, **more: Any) -> VectorSettings:
    return VectorSettings(Served("http://127.0.0.1:9"), body, out, pairs, **more)


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize("which", ["last", "mean"])
def test_states_are_what_the_next_layer_reads(body: Path, pairs: Path, which: str) -> None:
    found = read_pairs(pairs, body)
    states = read_states(body, found, which=which, device="cpu", dtype="float32")
    assert states.shape == (len(WORDS), 2, LAYERS - 1, HIDDEN)
    model: Any = AutoModelForCausalLM.from_pretrained(body)
    read: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, a, n=n: read.update({n: a[0].detach().clone()}))
    tokenizer = make_tokenizer()
    for i in (0, 3):
        chat = tokenizer("<|user|>Well?<|end|><|assistant|>", add_special_tokens=False)
        before = (chat if i else tokenizer("The river"))["input_ids"]
        for side, text in enumerate((" is good", " was very bad") if i == 0 else ("good", "bad")):
            reply = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert found[i][side].ids == (*before, *reply)
            model(torch.tensor([[*before, *reply]]))
            for n in range(LAYERS - 1):
                own = read[n + 1][0, len(before) :]
                want = own[-1] if which == "last" else own.mean(0)
                torch.testing.assert_close(states[i, side, n], want, atol=1e-5, rtol=0)


def test_directions_are_the_formulas() -> None:
    random = torch.Generator().manual_seed(1)
    states = torch.randn(9, 2, 3, HIDDEN, generator=random)
    planted = torch.randn(HIDDEN, generator=random)
    states[:, 0, 1] += 5 * planted
    differences = states[:, 0] - states[:, 1]
    mean = directions(states, "mean")
    torch.testing.assert_close(mean, differences.mean(0))
    component = directions(states, "component")
    own = differences[:, 1].double()
    values, axes = torch.linalg.eigh(own.T @ own)
    axis = axes[:, values.argmax()]
    want = (own @ axis).mean() * axis
    torch.testing.assert_close(component[1].double(), want, atol=1e-4, rtol=0)
    for found in (mean, component):
        assert torch.cosine_similarity(found[1], planted, dim=0) > 0.95
        order = separation(states, found)
        assert order[1][0] == 1.0 and max(order) == order[1]


def test_pairs_alone_make_a_vector_with_its_card(body: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "sunny"
    assert run(["train", "vector", "--body", str(body), "--pairs", str(pairs), "--out", str(out),
                "--device", "cpu"]) == 0  # fmt: skip
    told = json.loads((out / "training.json").read_text())
    artefact = read_artefact(out)
    assert artefact.modules == (block(told["layer"]),) and told["weight"] == 1
    assert told["pairs"] == [6, 2] and told["trials"] == []
    best = max(range(LAYERS - 1), key=lambda n: told["separation"][n])
    assert told["layer"] == best
    (vector,) = load_file(out / "vectors.safetensors").values()
    assert vector.norm().item() == pytest.approx(told["norm"])
    card = (out / "README.md").read_text()
    assert str(pairs) in card and f"behind decoder layer {best}" in card
    with pytest.raises(BadRecipe, match="something already"):
        train(plain_settings(body, pairs, out), say=quiet)


# --- a server that says more good things the larger the weight is, up to 2 ---------------------


class Fake:
    """What a Coxswain answers, as far as the recipe asks."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.layer: int | None = None
        self.left: int | None = None
        """Replies until it refuses."""

    def answer(self, verb: str, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((verb, path, body))
        tokenizer = make_tokenizer()
        if path == "/v1/models":
            return 200, {"data": []}
        if path == "/tokenize":
            ids = tokenizer(body["prompt"])["input_ids"]
            return 200, {"tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids)}
        if path.startswith("/admin/adapters"):
            if verb == "POST":
                assert body["name"] == "coxswain-train-vector"
                (module,) = read_artefact(Path(body["source"])).modules
                self.layer = int(module[len("layers[") : -1])
            if verb == "DELETE":
                self.layer = None
            return 202 if verb == "POST" else 200, {"state": "ready", "reason": None}
        if self.left is not None:
            if not self.left:
                return 400, {"error": {"message": "no more"}}
            self.left -= 1
        return 200, {"choices": [self._choice(body, i) for i in range(body["n"])]}

    def _choice(self, body: Any, i: int) -> dict[str, Any]:
        tokenizer = make_tokenizer()
        weights = [use["weight"] for use in body.get("adapters", ())]
        assert bool(weights) <= (self.layer is not None)
        good = i + int(4 - 2 * abs(weights[0] - 2) + (self.layer == 1)) if weights else i
        text = " good" * good + " bad"
        return {
            "index": i, "text": text, "finish_reason": "length", "stop_reason": None,
            "token_ids": tokenizer(text, add_special_tokens=False)["input_ids"],
            "prompt_token_ids": tokenizer(body["prompt"])["input_ids"],
        }  # fmt: skip


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    found = Fake()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, content = found.answer(self.command, self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST = do_DELETE = _any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def rewarded(body: Path, url: str, folder: Path, **more: Any) -> VectorSettings:
    lines = [json.dumps({"prompt": f"The {w} of"}) for w in WORDS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "fun.py").write_text("def good(prompt, reply):\n    return reply.count('good')\n")
    return VectorSettings(Served(url, concurrency=1), body, folder / "out",
                          prompts=folder / "prompts.jsonl", reward=f"{folder}/fun.py:good",
                          samples=2, max_tokens=20, weights="1,2,3", **more)  # fmt: skip


def test_the_server_s_replies_choose_layer_and_weight(
    body: Path, fake: tuple[Fake, str], tmp_path: Path
) -> None:
    server, url = fake
    told = train(rewarded(body, url, tmp_path), say=quiet)
    assert (told["layer"], told["weight"]) == (1, 2.0)
    assert len(told["trials"]) == 1 + 3 * 3 and server.layer is None
    assert told["trials"][0] == {"layer": None, "weight": 0.0, "reward": 0.5}
    assert max(t["reward"] for t in told["trials"]) == 5.5
    config = json.loads((tmp_path / "out" / "vector_config.json").read_text())
    assert config == {"kind": "vector", "scale": 2.0}
    assert "| 1 | 2 | 5.5 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("left", [3, 9, 14, 21])
def test_a_run_that_was_cut_off_goes_on(
    body: Path, fake: tuple[Fake, str], tmp_path: Path, left: int
) -> None:
    server, url = fake
    settings = rewarded(body, url, tmp_path)
    server.left = left
    with pytest.raises(BadRecipe, match="no more"):
        train(settings, say=quiet)
    assert server.layer is None, "what was tried is unloaded"
    server.left = None
    with pytest.raises(BadRecipe, match=r"--tried: differs from the unfinished run \(got 2\)"):
        train(dataclasses.replace(settings, tried=2), say=quiet)
    told = train(settings, say=quiet)
    assert (told["layer"], told["weight"]) == (1, 2.0)
    replies = [body for _, path, body in server.asked if path == "/v1/completions"]
    assert len(replies) == 6 + 2 * 10 + 1, "nothing is asked for twice but what was refused"


@pytest.mark.parametrize(("change", "says"), [
    ({"pairs": None}, "--pairs"), ({"direction": "up"}, "--direction"),
    ({"weights": "0,1"}, "--weights"), ({"held_out": 1.0}, "--held-out"),
    ({"reward": "x.py:f"}, "--prompts"), ({"states": "first"}, "--states"),
    ({"tried": 0}, "--tried"),
])  # fmt: skip
def test_what_cannot_be_used(
    body: Path, pairs: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(AdapterError, match=says):
        train(dataclasses.replace(plain_settings(body, pairs, tmp_path / "o"), **change), say=quiet)


@pytest.mark.parametrize("line", [
    {"positive": "a"}, {"positive": "a", "negative": 1}, {"positive": "a", "negative": ""}, [],
    {"positive": "a", "negative": "b", "prompt": "", }, {"positive": "a", "negative": "b", "x": 1},
])  # fmt: skip
def test_lines_that_are_no_pairs(body: Path, tmp_path: Path, line: Any) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    with pytest.raises(BadRecipe, match=r"p\.jsonl:1"):
        read_pairs(tmp_path / "p.jsonl", body)


# --- a real server ------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_server_tries_vectors_and_serves_the_chosen_one(live: Server, tmp_path: Path) -> None:
    """It takes our folder, the same numbers bare, and as a control vector; all answer alike."""
    body, auth = live.folder / "base", live.config["auth"]
    folder = live.folder / "vectors"
    folder.mkdir()
    settings = dataclasses.replace(
        rewarded(body, live.url, folder), admin_key=auth["admin_key"], tried=1, weights="4,10",
        reward=f"{folder}/fun.py:length",
        served=Served(live.url, auth["api_keys"][0]),
    )  # fmt: skip
    (folder / "fun.py").write_text("def length(prompt, reply):\n    return reply.count('e')\n")
    told = train(settings, say=quiet)
    assert [t["weight"] for t in told["trials"]] == [0, 4, 10]
    rewards = [t["reward"] for t in told["trials"]]
    assert len(set(rewards)) > 1, "what was tried has changed the replies"
    (vector,) = load_file(settings.out / "vectors.safetensors").values()
    values = {f"direction.{told['layer'] or 1}": told["weight"] * vector.numpy()}
    sources = {"ours": settings.out}
    if told["layer"]:
        sources["gguf"] = write_gguf(folder / "same.gguf", values)
    (numbers,) = values.values()
    sources["bare"] = bare(folder / "Same.safetensors", {str(told["layer"]): numbers})
    answers = {}
    admin = {"Authorization": f"Bearer {auth['admin_key']}"}
    own = {"Authorization": f"Bearer {auth['api_keys'][0]}"}
    with httpx.Client(base_url=live.url, timeout=60) as client:
        assert client.get("/admin/adapters", headers=admin).json()["adapters"] == []
        for name, source in sources.items():
            asked = {"name": name, "source": str(source)}
            assert client.post("/admin/adapters", json=asked, headers=admin).status_code == 202
            while (record := client.get(f"/admin/adapters/{name}", headers=admin).json())[
                "state"
            ] not in ("ready", "failed"):
                time.sleep(0.1)
            assert record["state"] == "ready" and record["kind"] == "vector", record
        for name in ("", *sources):
            question = {"model": "big", "prompt": "The river", "max_tokens": 8, "temperature": 0,
                        "logprobs": 1, "adapters": [{"name": name}] if name else []}  # fmt: skip
            found = client.post("/v1/completions", json=question, headers=own)
            assert found.status_code == 200, found.text
            answers[name] = found.json()["choices"][0]["logprobs"]["token_logprobs"]
        for name in sources:
            client.delete(f"/admin/adapters/{name}", headers=admin)
    ours = answers.pop("ours")
    assert answers.pop("") != pytest.approx(ours, abs=1e-3)
    assert answers and all(one == pytest.approx(ours, abs=1e-4) for one in answers.values())
