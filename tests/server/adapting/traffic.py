"""Requests of all kinds that share batches, each checked against its answer run alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.server.adapting.answers import ABSENT, TOLERANCE, Name
from tests.server.adapting.expected import CONTENTS, Kind, Oracle
from tests.server.adapting.kit import streamed, tokens

ALONE: Sequence[Kind] = tuple(
    Kind(used, on_chat, strength, prompt)
    for prompt in (0, 1)
    for used, on_chat, strength in (
        ((), (), 0.0),
        ((), (), 0.8),
        ((("a", 1.0, None, None),), (), 0.0),
        ((("a", -0.5, None, None),), (), 0.0),
        ((("a", 1.0, None, None), ("b", 0.0, None, None)), (), 0.8),
        ((("a", 1.0, None, None), ("b", 0.5, None, None)), (), 0.0),
        ((("pack", 1.0, 2, 1.0),), (), 0.0),
        ((("pack", 1.0, 2, 15.0),), (), 0.8),
        ((("pack", 0.5, 1, 20.0), ("b", 1.0, None, None)), (), 0.0),
        ((), ("f",), 0.8),
        ((("b", 0.7, None, None),), ("f",), 0.8),
    )
)
"""Requests for adapters that stay as they are."""

CHANGING: Sequence[Kind] = tuple(
    Kind(used, (), strength, prompt)
    for prompt in (0, 1)
    for used, strength in (
        ((("?", 1.0, None, None),), 0.0),
        ((("?", 0.5, None, None), ("a", 1.0, None, None)), 0.0),
        ((("?", 1.0, None, None),), 0.8),
    )
)
"""Requests for an adapter, `?`, that is loaded, replaced and unloaded meanwhile."""


def with_content(kind: Kind, content: str) -> Kind:
    """The kind with a content in the place of `?`."""
    used = tuple((content if use[0] == "?" else use[0], *use[1:]) for use in kind.used)
    return Kind(used, kind.on_chat, kind.strength, kind.prompt)


@dataclass
class Traffic:
    """Clients that ask without a pause.

    Args:
        client: with the server as its base URL.
        oracle: knows all answers; computed before.
        digests: of the contents, once they are known: content → digest.
        names: adapters that change.
        seed: of the clients' choices.
    """

    client: httpx.AsyncClient
    oracle: Oracle
    names: Sequence[Name]
    digests: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    over: bool = False

    def prepare(self) -> None:
        """Computes every answer: none is waited for while the clients ask."""
        for kind in ALONE:
            self.oracle(kind)
        for kind in CHANGING:
            for content in CONTENTS:
                self.oracle(with_content(kind, content))

    async def run(self, clients: int) -> None:
        """Asks until `over`."""
        async with asyncio.TaskGroup() as group:
            for i in range(clients):
                group.create_task(self._client(random.Random(f"{self.seed}.{i}")))

    async def _client(self, dice: random.Random) -> None:
        while not self.over:
            if dice.random() < 0.5:
                await self._alone(dice, dice.choice(ALONE))
            else:
                await self._changing(dice, dice.choice(CHANGING), dice.choice(self.names))

    async def _alone(self, dice: random.Random, kind: Kind) -> None:
        first = kind.used[0] if kind.used else ("", 0.0, None, None)
        as_model = first[1:] == (1.0, None, None) and dice.random() < 0.5
        status, answer = await self._ask(dice, kind.body({}, as_model=as_model))
        assert status == 200, (kind, answer)
        self._check(kind, [kind], answer)
        self.answers["alone"] += 1

    async def _changing(self, dice: random.Random, kind: Kind, name: Name) -> None:
        as_model = kind.used[0][1] == 1.0 and dice.random() < 0.5
        body = kind.body({"?": name.name}, as_model=as_model)
        with name.watched() as seen:
            status, answer = await self._ask(dice, body)
        allowed = {*CONTENTS, ABSENT} if name.shared else seen
        if status == 404:
            assert ABSENT in allowed, (name, allowed, answer)
            self.answers["not there"] += 1
            return
        assert status == 200, (name, kind, answer)
        contents = sorted(allowed - {ABSENT})
        assert contents, (name, "was not there, and answered")
        found = self._check(kind, [with_content(kind, c) for c in contents], answer)
        content = contents[found]
        for used in answer.get("steering", {}).get("adapters", []):
            if used["name"] == name.name and content in self.digests:
                assert used["digest"] == self.digests[content], (name, content, used)
        self.answers["changing"] += 1

    def _check(self, asked: Kind, kinds: Sequence[Kind], answer: dict[str, Any]) -> int:
        """Which of the kinds the answer is, to the last digit that float32 has."""
        ids, logprobs = tokens(answer)
        errors = [self.oracle.known[kind].error(ids, logprobs) for kind in kinds]
        best = min(errors)
        assert best < TOLERANCE, (asked, dict(zip(kinds, errors, strict=True)), answer)
        self.worst = max(self.worst, best)
        return errors.index(best)

    async def _ask(self, dice: random.Random, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if dice.random() < 0.5:
            body["steering"] = {**body.get("steering", {}), "report": True}
        if dice.random() < 0.5:
            answer = await self.client.post("/v1/completions", json=body)
            return answer.status_code, answer.json()
        async with self.client.stream(
            "POST", "/v1/completions", json={**body, "stream": True}
        ) as s:
            if s.status_code != 200:
                return s.status_code, {"error": (await s.aread()).decode()}
            return 200, streamed([line async for line in s.aiter_lines()])
