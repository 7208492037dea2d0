"""Kills: of the server, of its Redis, of both; and a Redis that is away while servers run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import RegistryAway
from adapters.registry.connection import connect
from adapters.registry.embedded import EmbeddedRedis
from adapters.registry.feed import Feed
from adapters.registry.record import Content, Record
from adapters.registry.store import Snapshot, Store
from tests.adapters.registry.kit import make_lora, replica, until
from tests.adapters.sources.servers import Server, folder

WEIGHTS = "adapter_model.safetensors"
States = dict[str, list[Any]]


class Served:
    """A `served` process."""

    def __init__(self, root: Path, pause_s: float, remote: str, wanted: dict[str, str]) -> None:
        arguments = [str(root), str(pause_s), remote, *(f"{n}={s}" for n, s in wanted.items())]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.registry.served", *arguments],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self._out = self.process.stdout
        self.redis_pid = int(self._out.readline())
        self.seen: list[States] = []

    def until(self, condition: Callable[[States], bool]) -> States:
        """Reads states until one fulfils the condition."""
        for line in self._out:
            self.seen.append(json.loads(line))
            if condition(self.seen[-1]):
                return self.seen[-1]
        raise AssertionError(f"the process ended; last {self.seen[-1:]}")

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait()
        self._out.close()


@contextmanager
def served(
    root: Path, pause_s: float = 0.0, remote: str = "http://nowhere", **wanted: str
) -> Iterator[Served]:
    """With its end around it."""
    found = Served(root, pause_s, remote, wanted)
    try:
        yield found
    finally:
        found.kill()
        # The Redis that the killed process leaves behind; a next one may have ended it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.redis_pid, signal.SIGKILL)


def store_is_whole(root: Path) -> None:
    """Nothing half-written is visible and nothing is left over."""
    from adapters.sources.store import ContentStore

    store = ContentStore(root / "store")
    for digest in store.digests():
        store.verify(digest)
    assert list((root / "store/.tmp").iterdir()) == []


@pytest.mark.parametrize("redis_too", [False, True])
@pytest.mark.parametrize("stage", ["downloading", "loading"])
def test_a_kill_in_the_middle_of_a_load_loses_nothing(
    tmp_path: Path, stage: str, redis_too: bool
) -> None:
    good = make_lora(tmp_path / "in/good", 1.0)
    late = make_lora(tmp_path / "late", 2.0)
    free = threading.Event()
    answers = folder(late, "/late")
    whole = answers[f"/late/{WEIGHTS}"]

    def hold(request: Any) -> None:
        free.wait(30)
        whole(request)

    with Server(answers).running() as web:
        with served(tmp_path, good=str(good)) as first:
            first.until(lambda s: s["good"] == ["ready", None, 0, 1.0])
        pause_s = 0.0
        if stage == "downloading":
            web.answers[f"/late/{WEIGHTS}"] = hold
        else:
            pause_s = 30.0
        with served(tmp_path, pause_s, web.url, late=f"{web.url}/late") as second:
            second.until(lambda s: s.get("late", [""])[0] == stage)
            if redis_too:
                os.kill(second.redis_pid, signal.SIGKILL)
        free.set()
        with served(tmp_path, 0.0, web.url) as third:
            end = third.until(
                lambda s: s["late"][0] in ("ready", "failed") and s["good"][3] is not None
            )
            assert end == {"good": ["ready", None, 0, 1.0], "late": ["ready", None, 0, 2.0]}
            for states in third.seen:
                assert states["good"][0] == "ready"
                if states["late"][0] in ("pending", "downloading"):
                    assert states["late"][3] is None
            store_is_whole(tmp_path)


def test_what_kills_the_server_each_time_is_given_up(tmp_path: Path) -> None:
    make_lora(tmp_path / "in/good", 1.0)
    make_lora(tmp_path / "in/bad", 2.0)
    with served(tmp_path, good=str(tmp_path / "in/good")) as first:
        first.until(lambda s: s["good"][0] == "ready")
    wanted = {"bad": str(tmp_path / "in/bad")}
    for attempt in (1, 2, 3):
        with served(tmp_path, 30.0, **wanted) as process:
            process.until(lambda s, a=attempt: s.get("bad", [""] * 4)[0:3:2] == ["loading", a])  # type: ignore
        wanted = {}
    with served(tmp_path) as last:
        end = last.until(lambda s: s["bad"][0] == "failed" and s["good"][3] is not None)
        assert end["good"] == ["ready", None, 0, 1.0]
        assert "interrupted 3 times while loading" in end["bad"][1]


async def test_an_embedded_redis_that_is_killed_comes_back_with_everything(
    tmp_path: Path,
) -> None:
    from tests.adapters.registry.kit import Replica

    for name in ("a", "b"):
        make_lora(tmp_path / "in" / name, 1.0)
    async with connect(None, tmp_path / "redis") as connection:
        assert connection.embedded is not None
        found = Replica(connection, tmp_path / "in", tmp_path / "store", pause_s=0.3)
        async with found.running() as r:
            await r.manager.submit("a", str(tmp_path / "in/a"))
            await until(lambda: r.answers("a") == 1.0)
            await r.manager.submit("b", str(tmp_path / "in/b"))
            await until(lambda: r.manager.records["b"].state == "loading")
            for _ in range(3):
                pid = connection.embedded.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await until(lambda p=pid: connection.embedded.pid not in (None, p))  # type: ignore
                assert r.answers("a") == 1.0
            await until(lambda: r.manager.records["b"].state == "ready")
            assert r.answers("b") == 1.0
            assert set((await r.manager.registry.snapshot()).records) == {"a", "b"}


async def test_replicas_serve_on_while_redis_is_away_and_converge_when_it_is_back(
    tmp_path: Path,
) -> None:
    for i in (1, 2, 3):
        make_lora(tmp_path / f"in/{i}", float(i))
    redis = EmbeddedRedis(tmp_path / "redis")
    redis.start()
    try:
        async with (
            replica(redis.url, "x", tmp_path / "in", tmp_path / "s1", pause_s=0.2) as one,
            replica(redis.url, "x", tmp_path / "in", tmp_path / "s2") as two,
        ):
            await one.manager.submit("a", str(tmp_path / "in/1"))
            await until(lambda: two.answers("a") == 1.0)
            await one.manager.submit("b", str(tmp_path / "in/2"))
            await until(lambda: one.manager.records["b"].state == "loading")
            await asyncio.to_thread(redis.stop)
            await until(lambda: one.manager.feed.away is not None)
            await until(lambda: two.manager.feed.away is not None)
            with pytest.raises(RegistryAway):
                await two.manager.submit("c", str(tmp_path / "in/3"))
            await asyncio.sleep(1.2)
            assert one.answers("a") == two.answers("a") == 1.0
            await asyncio.to_thread(redis.start)
            for r in (one, two):
                await until(lambda r=r: r.answers("b") == 2.0, 5)  # type: ignore[misc]
            await two.manager.submit("c", str(tmp_path / "in/3"))
            await until(lambda: one.answers("c") == 3.0, 3)
    finally:
        redis.stop()


async def test_leases_mean_nothing_right_after_redis_was_away(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path / "redis")
    redis.start()
    try:
        async with replica(redis.url, "x", tmp_path, tmp_path / "store", alive_s=1.5) as r:
            feed = r.manager.feed
            await until(lambda: feed.trusts_leases)
            await asyncio.to_thread(redis.stop)
            await until(lambda: feed.away is not None)
            assert not feed.trusts_leases
            await asyncio.to_thread(redis.start)
            await until(lambda: feed.away is None)
            assert not feed.trusts_leases
            await until(lambda: feed.trusts_leases, 3)
    finally:
        redis.stop()


async def test_a_lost_hint_delays_convergence_by_one_look_only(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    make_lora(tmp_path / "in/a", 1.0)
    async with (
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "s1") as one,
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "s2") as two,
    ):
        # Two listens to a channel on which nobody speaks.
        two.connection.store.channel = "silence"
        await two.connection.client.client_kill_filter(_type="pubsub")
        await one.manager.submit("a", str(tmp_path / "in/a"))
        await until(lambda: two.answers("a") == 1.0, 3)


async def test_a_dead_replica_s_lease_does_not_outlive_a_clock_that_was_set_back(
    redis_url: str, namespace: str
) -> None:
    """Set back by an hour, Redis's clock makes every lease an hour longer."""
    async with connect(redis_url, namespace=namespace) as connection:
        store, key = connection.store, f"{{{namespace}}}:replicas"
        await store.look(replica="dead", alive_ms=400)
        ends_ms = int(await connection.client.hget(key, "dead") or 0)
        await connection.client.hset(key, "dead", str(ends_ms + 3_600_000))
        assert (await store.look()).alive == {"dead"}
        assert (await store.look(replica="me", alive_ms=400)).alive == {"dead", "me"}
        await asyncio.sleep(0.5)
        assert (await store.look(replica="me", alive_ms=400)).alive == {"me"}


async def test_an_answer_behind_a_newer_one_does_not_bring_back_what_is_gone(
    redis_url: str, namespace: str
) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        late = asyncio.Event()

        class Overtaken(Store):
            """Its first look's answer arrives late."""

            async def look(self, *args: Any, **options: Any) -> Snapshot:
                found = await super().look(*args, **options)
                if not late.is_set():
                    late.set()
                    await overtaken.wait()
                return found

        overtaken = asyncio.Event()
        store = Overtaken(connection.client, namespace)
        feed = Feed(connection.client, store, "me", lambda _: None)
        record = Record(Content("a", "1", "/a", "base"), "pending", 0.0, 0.0)
        assert await store.swap("a", None, record) == 1
        first = asyncio.create_task(feed.look())
        await late.wait()
        (seen,) = (await connection.store.look()).records.values()
        assert await store.swap("a", seen, None) == 2
        assert not (await feed.look()).records
        overtaken.set()
        assert not (await first).records and not feed.latest.records
