"""Phases over HTTP: in a request and in a profile, by position and by text, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from steering.method import Logits, log_softmax
from tests.models import make_tokenizer
from tests.reference import load, scores
from tests.server.api.asking import PROMPT, PROXY, complete, events
from tests.server.live import TEMPLATE, Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

TOKENS = 8
IDS = make_tokenizer().encode(PROMPT, add_special_tokens=False)


def want(models: Path, strength: float, reply: Sequence[int]) -> Logits:
    """The log-probabilities behind a reply at a strength."""
    ids = [*IDS, *reply]
    base, chat, plain = (scores(load(models / n), ids)[-1] for n in ("base", "chat", "plain"))
    return log_softmax(base + strength * (chat - plain))


def expect(models: Path, answer: dict[str, Any], strengths: Sequence[float]) -> list[int]:
    """Each token is the best one at its strength, with its log-probability."""
    (choice,) = answer["choices"]
    ids: list[int] = choice["token_ids"]
    told = choice["logprobs"]["token_logprobs"]
    assert len(ids) == len(strengths)
    for n, (token, logprob, strength) in enumerate(zip(ids, told, strengths, strict=True)):
        found = want(models, strength, ids[:n])
        assert found[token] == pytest.approx(found.max(), abs=1e-4), n
        assert logprob == pytest.approx(found[token], abs=1e-4), n
    return ids


def ask(server: Server, steering: Any, **more: Any) -> dict[str, Any]:
    return complete(server, steering, logprobs=1, return_token_ids=True, **more)


@pytest.fixture(scope="module")
def profile(server: Server) -> Iterator[str]:
    """One whose first tokens are the base's."""
    phases = [{"first": 3, "off": True}, {"from": 6, "strength": 0.4}]
    body = {**PROXY, "strength": 1.5, "phases": phases, "chat_template": TEMPLATE}
    answer = httpx.put(f"{server.url}/admin/profiles/warming", json=body)
    assert answer.status_code == 201, answer.text
    yield "warming"
    server.delete("/admin/profiles/warming")


def test_by_position(server: Server, models: Path) -> None:
    phases = [{"first": 2, "strength": 0.0}, {"from": 5, "strength": 2.0}]
    answer = ask(server, {**PROXY, "phases": phases, "report": "tokens"})
    expect(models, answer, [0, 0, 1, 1, 1, 2, 2, 2])
    report = answer["steering"]
    assert report["phases"] == [
        {"strengths": {"base": 1.0}},
        {"strengths": {"base": 1.0, "chat": 2.0, "plain": -2.0}},
    ]
    details = report["choices"][0]["token_details"]
    assert [d["kl"] > 1e-6 for d in details] == [False, False, *[True] * 6]


def test_by_text(server: Server, models: Path) -> None:
    """One that is there somewhere in the middle of the steered reply."""
    ids, tokenizer = ask(server, PROXY)["choices"][0]["token_ids"], make_tokenizer()
    texts = {n: tokenizer.decode(ids[n : n + 1]) for n in range(1, 6) if ids.index(ids[n]) == n}
    alone = {n: tokenizer.encode(text, add_special_tokens=False) for n, text in texts.items()}
    n = next(n for n, found in alone.items() if found == ids[n : n + 1])
    text = texts[n]
    behind = n + 1
    wanted = [1.0] * behind + [0.0] * (TOKENS - behind)
    after = {**PROXY, "phases": [{"after": text, "off": True}]}
    until = {**PROXY, "strength": 0.0, "phases": [{"until": text, "strength": 1.0}]}
    for steering in (after, until):
        expect(models, ask(server, steering), wanted)


def test_in_a_profile(server: Server, models: Path, profile: str) -> None:
    strengths = [0, 0, 0, 1.5, 1.5, 1.5, 0.4, 0.4]
    ids = expect(models, ask(server, profile), strengths)
    assert ask(server, None, model=profile)["choices"][0]["token_ids"] == ids
    body = {"model": profile, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
    streamed = [i for chunk in events(server, "/v1/completions", body)
                for choice in chunk["choices"] for i in choice["token_ids"] or ()]  # fmt: skip
    assert streamed == ids
    own = {"profile": profile, "phases": [{"from": 1, "strength": 0.1}]}
    expect(models, ask(server, own), [1.5, *[0.1] * 7])


def test_in_a_chat_with_several_choices(server: Server, profile: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": profile, "messages": messages, "max_tokens": 4, "n": 2, "temperature": 1,
            "seed": 5, "steering": {"report": "tokens"}}  # fmt: skip
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["steering"]["choices"]:
        kl = np.array([d["kl"] for d in choice["token_details"]])
        assert (kl[:3] < 1e-6).all() and (kl[3:] > 1e-6).all()


@pytest.mark.parametrize(
    ("phases", "field"),
    [
        ([{"strength": 0.5}], "steering.phases.0"),
        ([{"first": 2, "strength": 11}], "steering.phases.0.strength"),
        ([{"first": 2, "off": True}, {"from": 3, "values": []}], "steering.phases.1.values"),
        ([{"after": "x" * 17 + "é" * 17, "off": True}], "steering.phases.0.after"),
        ([{"first": 1, "off": True}] * 9, "steering.phases"),
    ],
)
def test_a_fault_is_told_with_its_field(server: Server, phases: Any, field: str) -> None:
    body = {"model": "big", "prompt": PROMPT, "steering": {**PROXY, "phases": phases}}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_top_n_sigma(server: Server, models: Path) -> None:
    """Of the steered scores: what is drawn is inside; other requests' rows are not touched."""
    drawn: dict[float, set[int]] = {}
    for n in (0.5, 3.0):
        answer = ask(server, PROXY, max_tokens=1, n=60, temperature=1, seed=3, top_n_sigma=n)
        drawn[n] = {choice["token_ids"][0] for choice in answer["choices"]}
        z = want(models, 1.0, [])
        kept = np.flatnonzero(z >= z.max() - n * z.std(ddof=1))
        assert drawn[n] <= {*kept.tolist()}
    assert len(drawn[3.0]) > len(drawn[0.5])
    plain = ask(server, None, max_tokens=1, n=60, temperature=1, seed=3)
    assert len({choice["token_ids"][0] for choice in plain["choices"]}) > len(drawn[0.5])


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"top_n_sigma": 0}, "top_n_sigma"),
        ({"top_n_sigma": 101.0}, "top_n_sigma"),
        ({"top_n_sigma": "1"}, "top_n_sigma"),
        ({"top_n_sigma": 1.0, "use_beam_search": True, "n": 2}, "top_n_sigma"),
        ({"vllm_xargs": {"coxswain_top_n_sigma": 1.0}}, "vllm_xargs.coxswain_top_n_sigma"),
        ({"top_nsigma": 1.0}, "top_nsigma"),
    ],
)
def test_what_top_n_sigma_may_not_be(server: Server, more: dict[str, Any], field: str) -> None:
    answer = server.post("/v1/completions", {"model": "big", "prompt": PROMPT, **more})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
