"""Requests that come when they come, whether or not earlier ones are answered: a Poisson process.

Every answer is compared with `transformers`; what a client waits is counted from the moment at
which it meant to ask.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from tests.fleet.asking import ADAPTED, STEERED
from tests.server.adapting.answers import TOLERANCE
from tests.server.adapting.expected import TOKENS, Kind, Oracle
from tests.server.adapting.kit import streamed, tokens

LONG = 120
"""Tokens of a long stream: seconds, so that some run whenever a server is asked to end."""

LARGE = 70_000
"""Bytes of a request that the load balancer cannot hold, and so cannot send again."""


@dataclass(frozen=True)
class SteeringRequest:
    """One request.

    Args:
        kind: what it asks for.
        length: tokens of its answer.
        stream: whether it streams.
        large: whether it is larger than what the load balancer holds.
        fresh: whether it opens a connection of its own.
    """

    kind: Kind
    length: int
    stream: bool
    large: bool
    fresh: bool

    @classmethod
    def drawn(cls, dice: random.Random, large: float) -> SteeringRequest:
        """One at random; `large` is the share of large ones."""
        stream = dice.random() < 0.75
        length = LONG if stream and dice.random() < 0.5 else TOKENS
        kind = dice.choice((*STEERED, *ADAPTED))
        return cls(kind, length, stream, dice.random() < large, dice.random() < 0.5)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        body = self.kind.body({}) | {"stream": self.stream, "max_tokens": self.length}
        return body | {"user": "x" * LARGE} if self.large else body


@dataclass(frozen=True)
class Seen:
    """What a client saw of one request, in seconds.

    Args:
        at: when it meant to ask, on `time.monotonic`.
        first: until the first bytes of the answer, or all of it.
        gap: the longest pause within a stream; 0 without one.
        tokens: of the answer.
        error: of the log-probabilities that are known, nats.
    """

    at: float
    first: float
    gap: float
    tokens: int
    error: float


@dataclass
class OpenLoop:
    """Clients of one address.

    Args:
        url: the address.
        oracle: knows the right answers.
        rate: requests per second, on average.
        large: share of the requests that are larger than what the load balancer holds.
        seed: of the arrivals.
    """

    url: str
    oracle: Oracle
    rate: float
    large: float = 0.0
    seed: int = 0
    seen: list[Seen] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def prepare(self) -> None:
        """Computes the right answers before the clock runs."""
        for kind in (*STEERED, *ADAPTED):
            self.oracle(kind)

    async def run(self) -> None:
        """Asks until `over`, and waits for the last answers."""
        dice = random.Random(self.seed)
        pool = httpx.Limits(max_connections=None)
        none = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=120, limits=pool) as kept,
            httpx.AsyncClient(base_url=self.url, timeout=120, limits=none) as fresh,
            asyncio.TaskGroup() as group,
        ):
            due = time.monotonic()
            while not self.over.is_set():
                asked = SteeringRequest.drawn(dice, self.large)
                group.create_task(self._ask(fresh if asked.fresh else kept, asked, due))
                due += dice.expovariate(self.rate)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.over.wait(), max(due - time.monotonic(), 0))

    async def _ask(self, client: httpx.AsyncClient, asked: SteeringRequest, due: float) -> None:
        try:
            self.seen.append(await self._answer(client, asked, due))
        except (AssertionError, httpx.HTTPError) as error:
            after = time.monotonic() - due
            self.failed.append(f"{asked} failed after {after:.2f} s: {error!r}")

    async def _answer(self, client: httpx.AsyncClient, asked: SteeringRequest, due: float) -> Seen:
        lines: list[str] = []
        times: list[float] = []
        async with client.stream("POST", "/v1/completions", json=asked.body) as answer:
            if answer.status_code != 200:
                raise AssertionError(f"{answer.status_code}: {(await answer.aread()).decode()}")
            async for line in answer.aiter_lines():
                lines.append(line)
                if line:
                    times.append(time.monotonic())
        found = streamed(lines) if asked.stream else json.loads("".join(lines))
        ids, logprobs = tokens(found)
        assert len(ids) == asked.length, (len(ids), asked)
        error = self.oracle(asked.kind).error(ids[:TOKENS], logprobs[:TOKENS])
        assert error < TOLERANCE, (error, asked)
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return Seen(due, times[0] - due, max(gaps, default=0.0), len(ids), error)


def told(name: str, seen: Sequence[Seen], seconds: float) -> str:
    """A line about the requests of some time."""
    first = sorted(one.first for one in seen)
    gap = max(one.gap for one in seen)
    return (
        f"{name}: {len(seen)} requests in {seconds:.1f} s ({len(seen) / seconds:.2f} per second), "
        f"first token p50 {first[len(first) // 2]:.3f} s, p99 {quantile(first, 0.99):.3f} s, "
        f"longest {first[-1]:.3f} s, longest pause within a stream {gap:.3f} s, "
        f"largest error {max(one.error for one in seen):.1e} nats"
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ordered numbers."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
