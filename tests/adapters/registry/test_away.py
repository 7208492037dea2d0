"""Kills of a server in the middle of loads; and a Redis that is away while servers run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import RegistryAway
from adapters.registry.feed import Feed
from adapters.registry.record import Content, Record
from adapters.registry.redis_store import RedisStore
from adapters.registry.store import NOWHERE, Changes, new_token
from tests.adapters.registry.kit import make_lora, opened, replica, until
from tests.adapters.sources.servers import Server, folder
from tests.redis_server import RedisServer

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


def store_is_whole(root: Path) -> None:
    """Nothing half-written is visible and nothing is left over."""
    from adapters.sources.store import ContentStore

    store = ContentStore(root / "store")
    for digest in store.digests():
        store.verify(digest)
    # A manager sweeps in the background.
    deadline = time.monotonic() + 20
    while (left := list((root / "store/.tmp").iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize("stage", ["downloading", "loading"])
def test_a_kill_in_the_middle_of_a_load_loses_nothing(tmp_path: Path, stage: str) -> None:
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


async def test_replicas_serve_on_while_redis_is_away_and_converge_when_it_is_back(
    tmp_path: Path,
) -> None:
    for i in (1, 2, 3):
        make_lora(tmp_path / f"in/{i}", float(i))
    redis = RedisServer(tmp_path / "redis")
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
    redis = RedisServer(tmp_path / "redis")
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
        assert isinstance(two.records, RedisStore)
        # Two listens to a channel on which nobody speaks.
        two.records.channel = "silence"
        await two.records.client.redis.client_kill_filter(_type="pubsub")
        await one.manager.submit("a", str(tmp_path / "in/a"))
        await until(lambda: two.answers("a") == 1.0, 3)


async def test_a_dead_replica_s_lease_does_not_outlive_a_clock_that_was_set_back(
    redis_url: str, namespace: str
) -> None:
    """Set back by an hour, Redis's clock makes every lease an hour longer."""
    async with opened(redis_url, namespace) as records:
        store, key = records, f"{{{namespace}}}:replicas"
        await store.look(NOWHERE, replica="dead", alive_ms=400)
        ends_ms = int(await records.client.redis.hget(key, "dead") or 0)
        await records.client.redis.hset(key, "dead", str(ends_ms + 3_600_000))
        assert (await store.look(NOWHERE)).alive == {"dead"}
        assert (await store.look(NOWHERE, replica="me", alive_ms=400)).alive == {"dead", "me"}
        await asyncio.sleep(0.5)
        assert (await store.look(NOWHERE, replica="me", alive_ms=400)).alive == {"me"}


async def test_an_answer_behind_a_newer_one_does_not_bring_back_what_is_gone(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as records:
        late, overtaken = asyncio.Event(), asyncio.Event()

        class Overtaken(RedisStore):
            """Its first look's answer arrives late."""

            async def look(self, *args: Any, **options: Any) -> Changes:
                found = await super().look(*args, **options)
                if not late.is_set():
                    late.set()
                    await overtaken.wait()
                return found

        feed = Feed(Overtaken(records.client, namespace), "me", lambda _: None)
        record = Record(Content("a", "1", "/a", "base"), "pending", 0.0, 0.0)
        token = new_token()
        await records.swap("a", "", record, token)
        first = asyncio.create_task(feed.look())
        await late.wait()
        await records.swap("a", token, None, new_token())
        second = asyncio.create_task(feed.look())
        await asyncio.sleep(0.05)
        overtaken.set()
        await asyncio.gather(first, second)
        assert not feed.records
