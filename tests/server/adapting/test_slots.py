"""More adapters than slots: all of them answer, pinned ones stay, and nobody is kept out."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.adapting.answers import TOLERANCE, Expected
from tests.server.adapting.expected import CONTENTS, Kind, Oracle
from tests.server.adapting.kit import PATIENCE_S, exact, listing, load, tokens, unload
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SLOTS = 4
ONE = {name: Kind(((name, 1.0, None, None),)) for name in ("a", "b", *CONTENTS)}
PAIRS = [
    Kind(((first, 1.0, None, None), (second, 0.5, None, None)))
    for first, second in (("a", "b"), ("a", "v0"), ("a", "v1"), ("b", "v0"), ("v0", "v1"))
]


@asynccontextmanager
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """With no limit of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as found:
        yield found


async def right(client: httpx.AsyncClient, body: dict[str, Any], expected: Expected) -> None:
    """A completion is the right one."""
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert expected.error(*tokens(answer.json())) < TOLERANCE, body


@pytest.fixture
def eight(live: Server, folders: dict[str, Path]) -> None:
    """Twice as many adapters as slots."""
    for name in CONTENTS:
        load(live, name, folders[name])


def drop_contents(live: Server) -> None:
    for name in CONTENTS:
        unload(live, name)


@pytest.mark.usefixtures("eight")
async def test_evicted_adapters_answer_again_and_pinned_ones_are_never_evicted(
    live: Server, oracle: Oracle
) -> None:
    dice = random.Random(1)
    for kind in (*ONE.values(), *PAIRS):
        oracle(kind)
    for name in ("a", "v3"):
        assert live.post(f"/admin/adapters/{name}/pin", {}).json()["here"]["resident"]
    before = listing(live)["engine"]
    async with client(live) as http:
        for _ in range(3):
            kinds = [*ONE.values(), *PAIRS]
            dice.shuffle(kinds)
            for kind in kinds:
                await right(http, kind.body({}), oracle(kind))
                shown = {r["name"]: r for r in listing(live)["adapters"]}
                assert shown["a"]["here"]["resident"] and shown["v3"]["here"]["resident"]
        after = listing(live)["engine"]
        assert after["evictions"] - before["evictions"] > len(kinds)
        assert after["taken"] == SLOTS
        # Those that are pinned are not loaded again, however many others come and go.
        for _ in range(5):
            await right(http, ONE["a"].body({}), oracle(ONE["a"]))
            await right(http, ONE["v3"].body({}), oracle(ONE["v3"]))
        assert listing(live)["engine"]["loads"] == after["loads"]
    for name in ("a", "v3"):
        live.post(f"/admin/adapters/{name}/unpin", {})
    drop_contents(live)


@pytest.mark.usefixtures("eight")
async def test_with_all_but_one_place_pinned_everyone_takes_turns_in_the_last_one(
    live: Server, oracle: Oracle
) -> None:
    pinned = ("a", "b", "v0")
    for name in pinned:
        assert live.post(f"/admin/adapters/{name}/pin", {}).status_code == 200
    refused = live.post("/admin/adapters/v1/pin", {})
    assert refused.status_code == 409 and "3 adapters are pinned" in refused.text
    late = live.post("/admin/adapters", {"name": "late", "source": "/nowhere", "pin": True})
    assert late.status_code in (400, 409)
    async with client(live) as http, asyncio.TaskGroup() as group:
        for kind in (*ONE.values(), *PAIRS) * 3:
            group.create_task(right(http, kind.body({}), oracle(kind)))
    shown = {r["name"]: r for r in listing(live)["adapters"]}
    assert all(shown[name]["here"]["resident"] for name in pinned)
    for name in pinned:
        assert live.post(f"/admin/adapters/{name}/unpin", {}).json()["pinned"] is False
    drop_contents(live)


@pytest.mark.usefixtures("eight")
async def test_more_sets_at_once_than_places_wait_their_turn_and_none_is_kept_out(
    live: Server, oracle: Oracle
) -> None:
    """Some sets are asked for without a pause; the others must get their turn all the same."""
    over = False

    async def busy(http: httpx.AsyncClient, kind: Kind) -> None:
        while not over:
            await right(http, kind.body({}), oracle(kind))

    async with client(live) as http, asyncio.TaskGroup() as group:
        for name in ("a", "b", "v0", "v1"):
            for _ in range(2):
                group.create_task(busy(http, ONE[name]))
        for kind in (ONE["v2"], ONE["v3"], *PAIRS):
            # Its answer is waited for while the others go on.
            await right(http, kind.body({}), oracle(kind))
        over = True
    assert listing(live)["engine"]["taken"] == SLOTS
    drop_contents(live)


async def test_one_content_under_many_names_takes_one_place(
    live: Server, folders: dict[str, Path], oracle: Oracle
) -> None:
    names = [f"same{i}" for i in range(6)]
    for name in names:
        load(live, name, shutil.copytree(folders["v0"], folders["v0"].parent / name))
    before = listing(live)["engine"]["loads"]
    for name in names:
        exact(live, ONE["v0"].body({"v0": name}, as_model=True), oracle(ONE["v0"]))
    assert listing(live)["engine"]["loads"] <= before + 1
    for name in names[:-1]:
        unload(live, name)
    exact(live, ONE["v0"].body({"v0": names[-1]}, as_model=True), oracle(ONE["v0"]))
    unload(live, names[-1])
    gone = listing(live)
    assert not any(r["name"].startswith("same") for r in gone["adapters"])
    until(lambda: listing(live)["engine"]["taken"] <= len(gone["adapters"]), 30)
