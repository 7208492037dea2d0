"""All kinds of requests share batches while administrators change the adapters they use.

`COXSWAIN_STRESS=5000 pytest tests/server/adapting/test_stress.py -s` does as many operations.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from adapters.formats.inspect import read_artefact
from adapters.sources.store import ContentStore
from tests.adapters.make import spoiled
from tests.server.adapting.admins import Brawler, Office, Owner
from tests.server.adapting.answers import ABSENT, Name
from tests.server.adapting.expected import CONTENTS, Oracle
from tests.server.adapting.kit import (
    PATIENCE_S,
    listing,
    load_all,
    memory,
    records_on_disk,
    unload,
)
from tests.server.adapting.traffic import Traffic
from tests.server.live import Server
from tests.server.watch import until

OPERATIONS = int(os.environ.get("COXSWAIN_STRESS", "300"))
ROUNDS = 6
CLIENTS = 12
GROWTH = 96 << 20
"""Bytes by which the server and its engine may grow; allocators keep some of what was freed."""

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(400 + OPERATIONS)]


async def test_every_answer_is_right_while_administrators_change_everything(
    live: Server, folders: dict[str, Path], oracle: Oracle
) -> None:
    server = live
    sources = {**folders, "bad": spoiled(folders["a"], folders["a"].parent / "bad")}
    owned = [Name(f"own{i}") for i in range(4)]
    shared = [Name(f"shared{i}", shared=True) for i in range(2)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
        digests = {content: read_artefact(folders[content]).digest() for content in CONTENTS}
        traffic = Traffic(client, oracle, [*owned, *shared], digests)
        traffic.prepare()
        office = Office(client, sources)
        sizes = []
        for part in range(ROUNDS):
            office.left = OPERATIONS // ROUNDS
            workers: list[Owner | Brawler] = [
                Owner(office, owned[:2], random.Random(f"1.{part}")),
                Owner(office, owned[2:], random.Random(f"2.{part}")),
                *(Brawler(office, shared, random.Random(f"{i}.{part}")) for i in (3, 4)),
            ]
            traffic.over = False
            async with asyncio.TaskGroup() as group:
                group.create_task(traffic.run(CLIENTS))
                group.create_task(work(workers, traffic))
            sizes.append(memory(server))
    print(f"\n{sum(office.done.values())} operations: {dict(office.done)}\n"
          f"{sum(traffic.answers.values())} answers: {dict(traffic.answers)}; "
          f"largest error {traffic.worst:.1e}\n"
          f"MiB after each round: {[size >> 20 for size in sizes]}")  # fmt: skip
    # In the first rounds allocators and caches take what they need.
    grown = sizes[-1] - sizes[ROUNDS // 3]
    assert traffic.answers["changing"] > 50 and traffic.answers["alone"] > 50
    assert grown < GROWTH
    state = Path(server.config["registry"]["directory"])
    check_records(server, state, owned)
    check_nothing_is_left(server, state)
    load_all(server, folders)


async def work(workers: Sequence[Owner | Brawler], traffic: Traffic) -> None:
    """All the administrators' work; then the clients may stop."""
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run())
    traffic.over = True


def check_records(server: Server, state: Path, owned: Sequence[Name]) -> None:
    """The registry, the server and those who made the changes say the same."""
    # What the others began last comes to its end.
    until(lambda: not any(r["state"] in ("pending", "downloading", "loading", "unloading")
                          for r in listing(server)["adapters"]), PATIENCE_S)  # fmt: skip
    records = records_on_disk(state)
    shown = {record["name"]: record for record in listing(server)["adapters"]}
    assert records.keys() == shown.keys()
    assert sum(record["pinned"] for record in records.values()) < 4
    for name, record in records.items():
        assert record["state"] == shown[name]["state"]
        assert record["pinned"] == shown[name]["pinned"]
        serving, here = record["serving"], shown[name]["here"]
        assert (serving["version"] if serving else None) == here["version"], name
    for mine in owned:
        if mine.content == ABSENT:
            assert mine.name not in records
            continue
        record = records[mine.name]
        assert record["pinned"] == mine.pinned
        assert record["serving"]["source"].endswith(mine.content), (record, mine)
    engine = listing(server)["engine"]
    assert engine["taken"] <= engine["slots"] and engine["evictions"] > 0


def check_nothing_is_left(server: Server, state: Path) -> None:
    """After everything is unloaded: no record, no set in the engine, no file that is needed."""
    store = ContentStore(state / "adapters")
    used = {
        content["digest"]
        for record in records_on_disk(state).values()
        for content in (record["want"], record["serving"])
        if content and content["digest"]
    }
    store.collect(used, older_than_s=0)
    assert store.digests() == used
    for record in listing(server)["adapters"]:
        unload(server, record["name"])
    found = listing(server)
    assert found["adapters"] == [] and records_on_disk(state) == {}
    assert found["engine"]["taken"] == 0 and found["engine"]["bytes"] == 0
    store.collect((), older_than_s=0)
    assert store.digests() == frozenset()
    assert list((state / "adapters" / ".tmp").iterdir()) == []
