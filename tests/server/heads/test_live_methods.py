"""Values and critical tokens over HTTP: every number against slow references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.server.heads.asking import (
    CRITICAL,
    DRAW,
    PROMPT,
    TOLERANCE,
    TWO,
    VALUE,
    ask,
    expect,
    ids_of,
)
from tests.server.heads.headed import MOST, Slow
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.mark.parametrize("spec", [VALUE, {**VALUE, "values": TWO}, {**VALUE, "top_k": MOST}])
def test_value_augmented_is_its_formula(server: Server, slow: Slow, spec: dict[str, Any]) -> None:
    expect(ask(server, spec), slow, spec)


def test_strengths_of_two_values_are_chosen_at_run_time(server: Server, slow: Slow) -> None:
    texts = set()
    for strengths in ((3, 0), (0, 3), (1, 1), (3, 3)):
        terms = [{**term, "strength": s} for term, s in zip(TWO, strengths, strict=True)]
        answer = ask(server, {**VALUE, "values": terms})
        expect(answer, slow, {**VALUE, "values": terms})
        texts.add(tuple(ids_of(answer)))
    assert len(texts) > 2, "the strengths make no difference, so this shows nothing"
    none = [{**term, "strength": 0} for term in TWO]
    zero, base = ask(server, {**VALUE, "values": none}), ask(server)
    assert zero["choices"][0]["logprobs"] == base["choices"][0]["logprobs"]


def test_a_token_report_tells_the_values(server: Server, slow: Slow) -> None:
    answer = ask(server, {**VALUE, "values": TWO, "report": "tokens"})
    report, ids = answer["steering"], ids_of(answer)
    assert report["values"] == {"strengths": {"value": 0.8, "kind": 1.7}, "top_k": 6}
    for i, entry in enumerate(report["choices"][0]["token_details"]):
        text = [*PROMPT, *ids[:i]]
        want = {name: slow.head(name, text) for name in ("value", "kind")}
        assert entry["values"] == pytest.approx(want, abs=TOLERANCE)


def test_values_steer_an_adapted_base(server: Server, tuned: Slow) -> None:
    expect(ask(server, VALUE, model="tuned"), tuned, VALUE)


@pytest.mark.parametrize(
    "spec",
    [
        {**CRITICAL, "threshold": 0.99},
        {**CRITICAL, "classifier": "probe", "threshold": 0.4},
        {**CRITICAL, "mode": "soft"},
        {**CRITICAL, "mode": "soft", "aligned": "plain", "pretrained": "base"},
    ],
)
def test_critical_tokens_are_their_formula(
    server: Server, slow: Slow, spec: dict[str, Any]
) -> None:
    answer = ask(server, {**spec, "report": "tokens"})
    expect(answer, slow, spec)
    (choice,) = answer["steering"]["choices"]
    told = [entry["critical_probability"] for entry in choice["token_details"]]
    assert told == pytest.approx(slow.critical, abs=TOLERANCE)
    if spec.get("mode") == "soft":
        assert "share_critical" not in answer["steering"]
        return
    marked = [q > spec.get("threshold", 0.5) for q in slow.critical]
    assert [entry["critical"] for entry in choice["token_details"]] == marked
    writers = [entry["chosen_by"] for entry in choice["token_details"]]
    assert writers == ["plain" if critical else "base" for critical in marked]
    assert answer["steering"]["share_critical"] == np.mean(marked)
    assert 0 < np.mean(marked) < 1, "only one of the two writes, so this shows little"


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_an_adapter_makes_the_aligned_model_and_the_twin_is_without_it(
    server: Server, tuned: Slow, mode: str
) -> None:
    spec = {**CRITICAL, "pretrained": "twin", "classifier": "probe", "threshold": 0.4, "mode": mode}
    answer = ask(server, spec, model="tuned")
    expect(answer, tuned, spec)
    assert mode == "soft" or len({q > 0.4 for q in tuned.critical}) == 2
    assert ids_of(answer) != ids_of(ask(server, model="tuned"))


def test_profiles_of_these_methods(server: Server, slow: Slow) -> None:
    kinder = {**VALUE, "values": [{"stream": "kind", "strength": 1.5}]}
    expect(ask(server, {"top_k": 6}, model="kinder"), slow, kinder)
    expect(ask(server, "factual"), slow, CRITICAL)
    soft = ask(server, {"profile": "factual", "mode": "soft"})
    expect(soft, slow, {**CRITICAL, "mode": "soft"})
    picky = ask(server, {"n": 3, "report": True}, **{**DRAW, "model": "picky"})
    assert len(picky["steering"]["choices"][0]["values"]) == 3
