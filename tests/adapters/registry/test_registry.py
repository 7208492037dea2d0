"""The verbs on a real Redis: what may follow what, and that many at once lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import msgspec
import pytest
from redis.asyncio import Redis

from adapters.errors import Conflict, NoAdapter, RegistryAway
from adapters.registry.connection import connect
from adapters.registry.record import WORKING, Content, Facts, Record
from adapters.registry.registry import MOST_ATTEMPTS, Registry
from adapters.registry.store import Store

FACTS = Facts("lora", "tiny", 7)


def content(name: str = "a", source: str = "/x") -> Content:
    return Content(name, "1", source)


async def test_a_record_survives_the_way_through_redis_unchanged(
    redis_url: str, namespace: str
) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        registry = Registry(connection.store, "me")
        job = await registry.submit(content(source='/ü "x"'), pin=True, by="someone")
        assert await registry.get("a") == job
        assert (await registry.snapshot()).records == {"a": job}
        job2 = await registry.advance(job, "downloading")
        assert job2 is not None and job2.revision == job.revision + 1
        with pytest.raises(NoAdapter, match="no such adapter"):
            await registry.get("b")


async def test_states_follow_each_other_only_as_drawn(redis_url: str, namespace: str) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        registry = Registry(connection.store, "me")
        job = await registry.submit(content())
        with pytest.raises(Conflict, match="cannot become loading"):
            await registry.advance(job, "loading")
        assert await registry.advance(job, "downloading")
        assert await registry.advance(job, "loading")
        ready = await registry.ready(job, FACTS)
        assert ready is not None and ready.serving == msgspec.structs.replace(job.want, facts=FACTS)
        assert await registry.advance(job, "failed") is None, "the job is done"
        removed = await registry.remove("a")
        assert (await registry.remove("a")) == removed
        with pytest.raises(Conflict, match="being unloaded"):
            await registry.submit(content())
        with pytest.raises(Conflict, match="being unloaded"):
            await registry.pin("a", True)
        assert await registry.forget(removed) and not await registry.forget(removed)
        assert not (await registry.snapshot()).records


async def test_who_was_superseded_cannot_write_any_more(redis_url: str, namespace: str) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        one, two = Registry(connection.store, "one"), Registry(connection.store, "two")
        job = await one.submit(content())
        await two.submit(content(source="/y"), replace=True)
        for late in (one.advance(job, "downloading"), one.ready(job, FACTS), one.progress(job, 1),
                     one.advance(job, "failed", reason="x")):  # fmt: skip
            assert await late is None
        assert (await one.get("a")).want.source == "/y"
        assert await one.take(job) is None, "seen too long ago"


async def test_a_known_digest_makes_another_source_the_same_or_a_conflict(
    redis_url: str, namespace: str
) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        registry = Registry(connection.store, "me")
        job = await registry.submit(content())
        await registry.advance(job, "downloading")
        want = msgspec.structs.replace(job.want, digest="d" * 64)
        await registry.advance(job, "loading", want=want)
        done = await registry.ready(job, FACTS)
        same = msgspec.structs.replace(content(source="/elsewhere"), digest="d" * 64)
        assert await registry.submit(same) == done
        other = msgspec.structs.replace(content(source="/elsewhere"), digest="e" * 64)
        with pytest.raises(Conflict, match="digest dddddddddddd"):
            await registry.submit(other)


async def test_a_failed_adapter_can_be_asked_for_again_and_gives_up_in_the_end(
    redis_url: str, namespace: str
) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        registry = Registry(connection.store, "me")
        job = await registry.submit(content())
        await registry.advance(job, "failed", reason="why")
        assert (await registry.get("a")).reason == "why"
        again = await registry.submit(content())
        assert (again.state, again.reason, again.attempts) == ("pending", None, 1)
        for attempt in range(2, MOST_ATTEMPTS + 1):
            taken = await registry.take(again)
            assert taken is not None and taken.attempts == attempt
            again = taken
        last = await registry.take(again)
        assert last is not None and last.state == "failed" and "interrupted" in (last.reason or "")


async def test_a_registry_of_another_schema_is_refused(redis_url: str, namespace: str) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        await Registry(connection.store, "me").submit(content())
        await connection.client.hset(f"{{{namespace}}}:head", "schema", "99")
        with pytest.raises(RegistryAway, match="schema 99; this server knows 1"):
            await Registry(connection.store, "me").get("a")
        with pytest.raises(RegistryAway, match="schema 99"):
            async with connect(redis_url, namespace=namespace):
                pass


async def test_a_repeated_swap_whose_answer_was_lost_counts_once(
    redis_url: str, namespace: str
) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        record = Record(content(), "pending", 1.0, 1.0)
        first = await connection.store.swap("a", None, record)
        assert first is not None
        assert await connection.store.swap("a", None, record) == first
        other = msgspec.structs.replace(record, changed_s=2.0)
        assert await connection.store.swap("a", None, other) is None


async def test_no_more_are_pinned_than_may_be_however_many_try(
    redis_url: str, namespace: str
) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        registry = Registry(connection.store, "me")
        names = [f"n{i}" for i in range(12)]
        for name in names:
            await registry.submit(content(name))
        tried = await asyncio.gather(*(registry.pin(n, True, most=5) for n in names),
                                     return_exceptions=True)  # fmt: skip
        assert sum(isinstance(t, Record) for t in tried) == 5
        assert sum(isinstance(t, Conflict) for t in tried) == 7
        records = (await registry.snapshot()).records.values()
        assert sum(r.pinned for r in records) == 5


async def test_two_clients_and_thousands_of_operations_lose_no_write(
    redis_url: str, namespace: str
) -> None:
    """Each success is counted; the registry's revision counts the writes it has seen."""
    writes: Counter[str] = Counter()

    async def admin(registry: Registry, seed: int, jobs: dict[str, Record]) -> None:
        chance = random.Random(seed)
        for _ in range(500):
            name = chance.choice("abc")
            with contextlib.suppress(Conflict, NoAdapter):
                await one_operation(registry, chance, name, jobs)

    async def one_operation(
        registry: Registry, chance: random.Random, name: str, jobs: dict[str, Record]
    ) -> None:
        match chance.randrange(5):
            case 0:
                jobs[name] = await registry.submit(
                    content(name, f"/{chance.random()}"), replace=True
                )
                writes["submit"] += 1
            case 1 if name in jobs:
                states = {"pending": "downloading", "downloading": "loading"}
                following = states.get(jobs[name].state)
                if following is not None:
                    new = await registry.advance(jobs[name], following)  # type: ignore[arg-type]
                else:
                    new = await registry.ready(jobs[name], FACTS)
                if new is None:
                    del jobs[name]
                else:
                    jobs[name] = new
                    writes["advance"] += 1
            case 2 if name in jobs:
                new = await registry.progress(jobs[name], chance.randrange(1, 1 << 40))
                writes["progress"] += new is not None
            case 3:
                seen = await registry.get(name)
                if seen.state == "unloading":
                    gone = await registry.forget(seen)
                    writes["forget"] += gone
            case 4 if chance.random() < 0.3:
                seen = await registry.get(name)
                if seen.state != "unloading":
                    removed = await registry.remove(name)
                    # Another admin may have removed it in between; then nothing was written.
                    writes["remove"] += removed.owner == registry.replica and removed.revision > 0

    async with (
        connect(redis_url, namespace=namespace) as c1,
        connect(redis_url, namespace=namespace) as c2,
    ):
        registries = [Registry((c1, c2)[i % 2].store, f"r{i}") for i in range(6)]
        await asyncio.gather(*(admin(r, i, {}) for i, r in enumerate(registries)))
        snapshot = await registries[0].snapshot()
        assert snapshot == await registries[1].snapshot()
        revision = int(snapshot.position.rpartition(":")[2])
        assert revision == writes.total() and revision > 500
        for record in snapshot.records.values():
            assert (record.state in WORKING) <= bool(record.owner and record.job)


async def test_garbage_in_redis_is_named_not_served(redis_url: str, namespace: str) -> None:
    async with connect(redis_url, namespace=namespace) as connection:
        registry = Registry(connection.store, "me")
        await registry.submit(content())
        await connection.client.hset(f"{{{namespace}}}:records", "a", b'{"want": 1}')
        with pytest.raises(RegistryAway, match="a record that is none"):
            await registry.get("a")


async def test_a_redis_that_is_not_there_is_named() -> None:
    with pytest.raises(RegistryAway, match="does not answer"):
        async with connect("redis://127.0.0.1:9"):
            pass
    with pytest.raises(RegistryAway, match="not a URL"):
        async with connect("http://127.0.0.1"):
            pass


async def test_registries_in_one_redis_do_not_see_each_other(
    redis_url: str, namespace: str
) -> None:
    client = Redis.from_url(redis_url)
    await Registry(Store(client, f"{namespace}-1"), "me").submit(content())
    assert not (await Store(client, f"{namespace}-2").look()).records
    await client.aclose()
