"""Adapters on a real server: loaded, mixed, routed, replaced, unloaded; exact against PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.adapters.make import make_lora, make_native
from tests.adapters.models import Applied, adapted
from tests.server.live import Server, document
from tests.server.watch import until

TOLERANCE = 1e-4
"""Of log-probabilities, float32."""


@pytest.fixture(scope="module")
def folders(models: Path) -> dict[str, Path]:
    """Adapters of the base, one of `chat`, and a pack."""
    root, base = models / "adapters", models / "base"
    found = {name: make_lora(root / name, base, seed=10 + i) for i, name in enumerate("abcde")}
    found["f"] = make_lora(root / "f", models / "chat", seed=30)
    found["pack"] = make_native(root / "pack", base, tasks=3, seed=40)
    return found


@pytest.fixture(scope="module")
def server(models: Path, folders: dict[str, Path]) -> Iterator[Server]:
    """Three slots, one adapter from the configuration; no playground."""
    section = {
        "roots": ["./adapters"], "max_loaded": 3, "max_rank": 24,
        "preload": [{"name": "a", "source": "./adapters/a"}],
    }  # fmt: skip
    config = document(adapters=section, registry={"directory": "./state"}, playground=False)
    found = Server(models, config)
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


def load(server: Server, name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Loads an adapter and waits for its end: ready or failed."""
    body = {"name": name, "source": str(folder), **more}
    answer = httpx.post(f"{server.url}/admin/adapters", json=body)
    assert answer.status_code == 202, answer.text

    def settled() -> dict[str, Any] | None:
        record: dict[str, Any] = server.get(f"/admin/adapters/{name}").json()
        return record if record["state"] in ("ready", "failed") else None

    return until(settled)


def ask(server: Server, **body: Any) -> dict[str, Any]:
    """Eight greedy tokens with log-probabilities."""
    request = {"model": "big", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1,
               "ignore_eos": True, "return_token_ids": True, **body}  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


PROMPT = [11, 40, 7, 93, 5, 61, 22, 8, 15, 33]


def expect(answer: dict[str, Any], base: Path, *used: Applied) -> None:
    """The answer's log-probabilities are those of PEFT, or of a plain MeteoRA forward."""
    choice = answer["choices"][0]
    ids = choice["token_ids"]
    model = adapted(base, used)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    want = logits.log_softmax(-1)
    assert want.argmax(-1).tolist() == ids
    got = choice["logprobs"]["token_logprobs"]
    assert max(abs(g - float(w[i])) for g, w, i in zip(got, want, ids, strict=True)) < TOLERANCE


def test_single_weighted_mixed_and_routed(server: Server, folders: dict[str, Path]) -> None:
    base = folders["a"].parents[1] / "base"
    for name in ("b", "pack"):
        record = load(server, name, folders[name])
        assert record["state"] == "ready", record
    a, b, pack = folders["a"], folders["b"], folders["pack"]
    expect(ask(server), base)
    expect(ask(server, model="a"), base, Applied(a))
    expect(ask(server, adapters=[{"name": "b", "weight": -0.5}]), base, Applied(b, -0.5))
    mixed = ask(server, model="a", adapters=[{"name": "b", "weight": 0.5}])
    expect(mixed, base, Applied(a), Applied(b, 0.5))
    assert mixed["model"] == "a"
    routed = ask(server, steering={"report": True},
                 adapters=[{"name": "pack", "top_k": 2, "temperature": 15}])  # fmt: skip
    expect(routed, base, Applied(pack, top_k=2, temperature=15))
    report = routed["steering"]["adapters"][0]
    assert report["name"] == "pack" and len(report["digest"]) == 64
    assert report["routed"].keys() == {"task0", "task1", "task2"}
    assert math.isclose(sum(report["routed"].values()), 1)


def test_a_server_without_playground_has_neither_page_nor_offers(server: Server) -> None:
    for path in ("/playground", "/playground/main.js"):
        assert server.get(path).status_code == 404
    assert server.get("/v1/playground").status_code == 404
