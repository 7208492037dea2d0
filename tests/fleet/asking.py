"""A mixed load, sent at once, every answer compared with `transformers`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from tests.server.adapting.answers import TOLERANCE
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import streamed, tokens

STEERED = [Kind(strength=s, prompt=p) for s in (0.0, 0.5, 1.0, 2.0) for p in (0, 1)]
"""Proxy-tuning at several strengths, also not at all; a short prompt and one of several blocks."""

ADAPTED = [
    Kind((("a", 1.0, None, None),)),
    Kind((("a", 0.5, None, None), ("b", -0.3, None, None)), strength=0.7),
    Kind((("pack", 1.0, 2, 1.0),), strength=1.0, prompt=1),
]
"""One adapter, a mix and a pack, the last two steered."""


TOLD = {
    "model": "big", "prompt": "Water boils", "max_tokens": 6, "ignore_eos": True,
    "steering": {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain",
                 "report": "tokens"},
}  # fmt: skip
"""Reports unembed each stream once more: every rank must take part, or the engine hangs."""


@dataclass
class Load:
    """What came back.

    Args:
        answers: how many, all right.
        error: the largest of a log-probability, nats.
        seconds: from the first request to the last answer.
    """

    answers: int
    error: float
    seconds: float


def ask_all(
    url: str, oracle: Oracle, kinds: Sequence[Kind], *, rounds: int, key: str | None = None
) -> Load:
    """Sends every kind `rounds` times, eight at a time, every other one streamed.

    Raises:
        AssertionError: an answer is missing or wrong.
    """
    for kind in kinds:
        oracle(kind)  # computed before the clock runs
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    def ask(numbered: tuple[int, Kind]) -> float:
        number, kind = numbered
        body = kind.body({}) | {"stream": number % 2 == 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        found = streamed(answer.text.split("\n")) if body["stream"] else answer.json()
        error = oracle(kind).error(*tokens(found))
        assert error < TOLERANCE, (error, body)
        return error

    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(ask, enumerate([*kinds] * rounds)))
    return Load(len(errors), max(errors), time.monotonic() - begun)
