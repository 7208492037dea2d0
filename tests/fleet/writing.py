"""Somebody who loads, replaces and unloads adapters, and remembers what was acknowledged."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.server.adapting.expected import CONTENTS, Kind, Oracle
from tests.server.adapting.kit import PATIENCE_S, exact, record_of
from tests.server.live import Server
from tests.server.watch import until

MOST = 4
"""Names that are there at the same time."""


@dataclass
class Writer:
    """Works through one address until it is told to end.

    Args:
        url: the address.
        folders: of the adapters, by content.
        rate: writes per second, on average.
        there: what each name stands for: (version, content).
        gone: names that were unloaded.
        done: acknowledged writes, by kind.
        failed: the others.
    """

    url: str
    folders: dict[str, Path]
    rate: float
    there: dict[str, tuple[str, str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    async def run(self) -> None:
        """Writes until `over`."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            while not self.over.is_set():
                try:
                    await self._write(client)
                except (AssertionError, httpx.HTTPError) as error:
                    self.failed.append(repr(error))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.over.wait(), self.dice.expovariate(self.rate))

    async def _write(self, client: httpx.AsyncClient) -> None:
        act = self.dice.choice(("load", "replace", "unload"))
        if len(self.there) < 2:
            act = "load"
        elif len(self.there) == MOST and act == "load":
            act = "unload"
        if act == "unload":
            name = self.dice.choice(sorted(self.there))
            answer = await client.delete(f"/admin/adapters/{name}")
        else:
            written = f"w{self.done['load']}"
            name = written if act == "load" else self.dice.choice(sorted(self.there))
            version, content = str(self.done.total()), self.dice.choice(CONTENTS)
            body = {"name": name, "source": str(self.folders[content]), "version": version,
                    "replace": act == "replace"}  # fmt: skip
            answer = await client.post("/admin/adapters", json=body)
        assert answer.status_code == 202, (act, name, answer.status_code, answer.text)
        self.done[act] += 1
        if act == "unload":
            del self.there[name]
            self.gone.append(name)
        else:
            self.there[name] = (version, content)

    def kept(self, replica: Server, oracle: Oracle) -> None:
        """Asserts that a replica has all that was acknowledged, and serves it."""
        for name, (version, content) in self.there.items():
            until(lambda n=name, v=version: _serves(replica, n, v), PATIENCE_S)  # type: ignore[misc]
            kind = Kind(((content, 1.0, None, None),))
            exact(replica, kind.body({content: name}, as_model=True), oracle(kind))
        for name in self.gone:
            path = f"/admin/adapters/{name}"
            until(lambda p=path: replica.get(p).status_code == 404, PATIENCE_S)  # type: ignore[misc]

    def prepare(self, oracle: Oracle) -> None:
        """Computes the right answers before the clock runs."""
        for content in CONTENTS:
            oracle(Kind(((content, 1.0, None, None),)))


def _serves(replica: Server, name: str, version: str) -> bool:
    record = record_of(replica, name)
    assert record["state"] != "failed" and not record["here"]["failure"], record
    here = record["here"]["version"]
    return bool(record["state"] == "ready" and record["version"] == version == here)
