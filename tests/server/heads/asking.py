"""Requests of the tests, and the check of a greedy answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.server.heads.headed import Slow
from tests.server.live import Server

TOLERANCE = 1e-4
"""Of log-probabilities and values, float32."""

PROMPT = [11, 40, 7, 93, 5, 61, 22, 8, 15, 33]
GREEDY = {"model": "big", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
DRAW = {"model": "big", "prompt": PROMPT, "max_tokens": 9, "temperature": 1.0, "seed": 7}
VALUE: dict[str, Any] = {
    "method": "value_augmented",
    "values": [{"stream": "value", "strength": 2.0}],
    "top_k": 6,
}
TWO = [{"stream": "value", "strength": 0.8}, {"stream": "kind", "strength": 1.7}]
CRITICAL = {"method": "critical_tokens", "pretrained": "plain", "classifier": "critic"}
BEST = {"method": "best_of_n", "n": 6, "value": "value"}


def ask(server: Server, steering: Any = None, **more: Any) -> dict[str, Any]:
    body = {**GREEDY, "logprobs": 3, "return_token_ids": True, "steering": steering, **more}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids_of(answer: Mapping[str, Any], index: int = 0) -> list[int]:
    found: list[int] = answer["choices"][index]["token_ids"]
    return found


def expect(answer: Mapping[str, Any], slow: Slow, spec: Mapping[str, Any]) -> None:
    """Every token is the formula's first choice, and has its log-probability."""
    ids, told = ids_of(answer), answer["choices"][0]["logprobs"]["token_logprobs"]
    assert len(ids) == GREEDY["max_tokens"]
    for i, (token, logprob) in enumerate(zip(ids, told, strict=True)):
        want = getattr(slow, spec["method"])(spec, [*PROMPT, *ids[:i]])
        assert token == want.argmax()
        assert logprob == pytest.approx(want[token], abs=TOLERANCE)
