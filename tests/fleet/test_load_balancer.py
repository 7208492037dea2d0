"""Two replicas with one Redis behind HAProxy: one address, one set of adapters, also while they are
restarted in turn.

The tests follow each other: the last one ends both replicas.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.fleet.asking import ADAPTED, STEERED, ask_all
from tests.fleet.balancing import NAMES, Balancer, Fleet, balancer, served, two_replicas
from tests.fleet.open_loop import OpenLoop, told
from tests.fleet.writing import Writer
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import load_all, record_of
from tests.server.reading import BODY, Stream
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

NOTICE_S = 2.0
"""Longer than HAProxy needs to see it: it looks every half second."""

RATE = 3.0
"""Requests per second. One replica, on a machine with two cores of which the other's start takes
one, answers about twice as many.
"""

WRITES = 1.0
"""Adapter writes per second."""

BEFORE_S = 20.0
"""How long the load runs before anything is restarted."""


@pytest.fixture(scope="module")
def fleet(
    models: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Both replicas, with some adapters that were loaded through the first."""
    root = tmp_path_factory.mktemp("balanced")
    with two_replicas(models, root, drain_notice_s=NOTICE_S) as found:
        load_all(found.servers["one"], folders)
        for name in ("a", "b", "pack", "f"):
            until(lambda n=name: record_of(found.servers["two"], n)["state"] == "ready", 60)  # type: ignore[misc]
        yield found


@pytest.fixture(scope="module")
def front(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    """HAProxy before them."""
    with balancer(tmp_path_factory.mktemp("haproxy"), fleet.ports) as found:
        yield found


def test_both_answer_rightly(fleet: Fleet, front: Balancer, oracle: Oracle) -> None:
    """Also with adapters that were loaded through one of them."""
    replicas = list(fleet.servers.values())
    before = [served(each) for each in replicas]
    load = ask_all(front.url, oracle, [*STEERED, *ADAPTED], rounds=4)
    shares = [served(each) - old for each, old in zip(replicas, before, strict=True)]
    assert sum(shares) == load.answers and min(shares) > load.answers / 4, shares
    # What the autoscaler of the Helm chart reads.
    assert "\nvllm:num_requests_waiting{" in replicas[0].get("/metrics").text
    print(
        f"\nbehind HAProxy: {load.answers} answers, {shares[0]} + {shares[1]}, largest error "
        f"{load.error:.1e} nats, {load.seconds:.1f} s"
    )


def test_tokens_come_one_by_one(front: Balancer) -> None:
    """A balancer that collects what is small makes bundles of them."""
    times = []
    body = BODY | {"max_tokens": 100}
    with httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    pauses = sorted(later - earlier for earlier, later in pairwise(times))
    print(f"\nmedian pause between two tokens: {1000 * pauses[len(pauses) // 2]:.2f} ms")
    assert pauses[len(pauses) // 2] > 0.0005


async def test_a_rolling_restart_loses_nothing(
    fleet: Fleet, front: Balancer, folders: dict[str, Path], oracle: Oracle
) -> None:
    """No request and no acknowledged write, while clients ask and somebody writes all the time."""
    clients = OpenLoop(front.url, oracle, RATE, large=0.1)
    writer = Writer(front.url, folders, WRITES)
    clients.prepare()
    writer.prepare(oracle)
    resent = front.resent
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run())
        group.create_task(writer.run())
        begun = time.monotonic()
        try:
            await asyncio.sleep(BEFORE_S)
            leaving = time.monotonic()
            # The first one comes back without notice, for the next test.
            for name, notice in zip(NAMES, (0.0, NOTICE_S), strict=True):
                restart = await asyncio.to_thread(restarted, fleet, front, name, notice)
                print(f"\nreplica {name}: {restart}", end="")
            back = time.monotonic()
            await asyncio.sleep(5)
        finally:
            clients.over.set()
            writer.over.set()
    before = [one for one in clients.seen if one.at < leaving]
    during = [one for one in clients.seen if leaving <= one.at < back]
    print("\n" + told("before", before, leaving - begun))
    print(told("meanwhile", during, back - leaving))
    print(
        f"writes acknowledged: {dict(writer.done)}; failed: {len(writer.failed)}; requests "
        f"failed: {len(clients.failed)}, sent again: {front.resent - resent}"
    )
    assert not clients.failed, "\n".join(clients.failed[:5])
    assert not writer.failed, "\n".join(writer.failed[:5])
    for replica in fleet.servers.values():
        await asyncio.to_thread(writer.kept, replica, oracle)
    print(f"kept on both: {len(writer.there)} adapters, {len(writer.gone)} unloaded")


@dataclass(frozen=True)
class Restart:
    """One replica's, in seconds.

    Args:
        noticed: from SIGTERM until HAProxy looked elsewhere.
        ended: from SIGTERM to the end of the process.
        started: from the start of the next process until it was ready.
        used: from being ready until HAProxy sent requests again.
    """

    noticed: float
    ended: float
    started: float
    used: float

    def __str__(self) -> str:
        return (
            f"out of use {self.noticed:.1f} s after SIGTERM, ended after {self.ended:.1f} s; "
            f"ready {self.started:.1f} s after its start, in use {self.used:.1f} s later"
        )


def restarted(fleet: Fleet, front: Balancer, name: str, notice: float) -> Restart:
    """As docs/deploy/deploy.md says: SIGTERM, the end, a start, and on once HAProxy uses it."""
    old = fleet.servers[name]
    begun = time.monotonic()
    old.process.send_signal(signal.SIGTERM)
    until(lambda: not front.up(name), 30)
    noticed = time.monotonic()
    assert old.process.wait(60) == 0, old.log.read_text()
    ended = time.monotonic()
    assert old.log.read_text().strip().endswith("coxswain: ended in order")
    fleet.start(name, drain_notice_s=notice)
    ready = time.monotonic()
    until(lambda: front.up(name), 30)
    return Restart(noticed - begun, ended - begun, ready - ended, time.monotonic() - ready)


async def test_a_replica_that_ends_without_notice_loses_nothing(
    fleet: Fleet, front: Balancer, oracle: Oracle
) -> None:
    """It refuses at once; HAProxy sends those requests again, which it can if it holds them."""
    clients = OpenLoop(front.url, oracle, RATE, seed=1)
    one = fleet.servers["one"]
    before = front.resent
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run())
        try:
            await asyncio.sleep(5)
            # It must have something to finish, or it ends before anyone asks it.
            await asyncio.to_thread(until, lambda: one.get("/ready").json()["in_flight"] > 1)
            begun = time.monotonic()
            one.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(ask_all, front.url, oracle, STEERED, rounds=2)
            assert await asyncio.to_thread(one.process.wait, 60) == 0
            ended = time.monotonic()
            await asyncio.sleep(5)
        finally:
            clients.over.set()
    during = [each for each in clients.seen if begun <= each.at < ended]
    print("\n" + told("while one ended without notice", during, ended - begun))
    print(f"requests sent again: {front.resent - before}")
    assert not clients.failed, "\n".join(clients.failed[:5])
    assert one.log.read_text().strip().endswith("coxswain: ended in order")


def test_where_no_replica_is_left_clients_are_told_to_come_back(
    fleet: Fleet, front: Balancer
) -> None:
    """What the last one has begun it finishes."""
    last = fleet.servers["two"]
    stream = Stream(front)
    stream.start()
    assert stream.begun.wait(60)
    last.process.send_signal(signal.SIGTERM)
    until(lambda: not front.up("two"), 30)
    refused = httpx.post(f"{front.url}/v1/completions", json=BODY, timeout=60)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "service_unavailable_error"
    stream.join(60)
    assert [line for line in stream.lines if line][-1] == "data: [DONE]"
    assert last.process.wait(60) == 0
