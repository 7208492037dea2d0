"""The verbs on a real Redis: what may follow what, and that many at once lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import msgspec
import pytest

from adapters.errors import Conflict, NoAdapter, RegistryAway
from adapters.registry.address import parse_address
from adapters.registry.client import Client
from adapters.registry.connection import open_store
from adapters.registry.record import WORKING, Content, Facts, Record
from adapters.registry.redis_store import RedisStore
from adapters.registry.registry import MOST_ATTEMPTS, Registry
from adapters.registry.store import NOWHERE, new_token
from tests.adapters.registry.kit import all_records, opened

FACTS = Facts("lora", "tiny", 7)


def content(name: str = "a", source: str = "/x") -> Content:
    return Content(name, "1", source)


async def test_a_record_survives_the_way_through_redis_unchanged(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
        job = await registry.submit(content(source='/ü "x"'), pin=True, by="someone")
        assert await registry.get("a") == job
        assert await all_records(store) == {"a": job}
        job2 = await registry.advance(job, "downloading")
        assert job2 is not None and job2.token not in ("", job.token)
        with pytest.raises(NoAdapter, match="no such adapter"):
            await registry.get("b")


async def test_states_follow_each_other_only_as_drawn(redis_url: str, namespace: str) -> None:
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
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
        assert not await all_records(store)


async def test_who_was_superseded_cannot_write_any_more(redis_url: str, namespace: str) -> None:
    async with opened(redis_url, namespace) as store:
        one, two = Registry(store, "one"), Registry(store, "two")
        job = await one.submit(content())
        await two.submit(content(source="/y"), replace=True)
        for late in (one.advance(job, "downloading"), one.ready(job, FACTS),
                     one.advance(job, "failed", reason="x")):  # fmt: skip
            assert await late is None
        assert (await one.get("a")).want.source == "/y"
        assert await one.take(job) is None, "seen too long ago"


async def test_a_known_digest_makes_another_source_the_same_or_a_conflict(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
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
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
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
    async with opened(redis_url, namespace) as store:
        await Registry(store, "me").submit(content())
        await store.client.redis.hset(f"{{{namespace}}}:head", "schema", "99")
        with pytest.raises(RegistryAway, match="schema 99; this server knows 2"):
            await Registry(store, "me").get("a")
        with pytest.raises(RegistryAway, match="schema 99"):
            async with opened(redis_url, namespace):
                pass


async def test_a_repeated_swap_whose_answer_was_lost_counts_once(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as store:
        record = Record(content(), "pending", 1.0, 1.0)
        made, gone = new_token(), new_token()
        for _ in range(2):
            assert (await store.swap("a", "", record, made)).outcome == "done"
        assert (await store.swap("a", "", record, new_token())).outcome == "other"
        for _ in range(2):
            assert (await store.swap("a", made, None, gone)).outcome == "done"
        assert (await store.look(NOWHERE)).position.writes == 2


async def test_no_more_are_pinned_than_may_be_however_many_try(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
        names = [f"n{i}" for i in range(12)]
        for name in names:
            await registry.submit(content(name))
        tried = await asyncio.gather(*(registry.pin(n, True, most=5) for n in names),
                                     return_exceptions=True)  # fmt: skip
        assert sum(isinstance(t, Record) for t in tried) == 5
        assert sum(isinstance(t, Conflict) for t in tried) == 7
        records = (await all_records(store)).values()
        assert sum(r.pinned for r in records) == 5


async def test_two_clients_and_thousands_of_operations_lose_no_write(
    redis_url: str, namespace: str
) -> None:
    """Each success is counted; the registry counts the writes it has seen."""
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
            case 2 if name in jobs and jobs[name].state in WORKING:
                taken = await registry.take(jobs[name])
                writes["take"] += taken is not None
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
                    writes["remove"] += removed.owner == registry.replica

    async with (
        opened(redis_url, namespace) as c1,
        opened(redis_url, namespace) as c2,
    ):
        registries = [Registry((c1, c2)[i % 2], f"r{i}") for i in range(6)]
        await asyncio.gather(*(admin(r, i, {}) for i, r in enumerate(registries)))
        found = await all_records(c1)
        assert found == await all_records(c2)
        position = (await c1.look(NOWHERE)).position
        assert position.writes == writes.total() and position.writes > 500
        for record in found.values():
            assert (record.state in WORKING) <= bool(record.owner and record.job)


async def test_hundreds_of_calls_at_once_wait_for_each_other(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
        await asyncio.gather(*(registry.submit(content(f"n{i}")) for i in range(400)))
        assert len(await all_records(store)) == 400


async def test_garbage_in_redis_is_named_not_served(redis_url: str, namespace: str) -> None:
    async with opened(redis_url, namespace) as store:
        registry = Registry(store, "me")
        await registry.submit(content())
        await store.client.redis.hset(f"{{{namespace}}}:records", "a", b'{"want": 1}')
        with pytest.raises(RegistryAway, match="a record that is none"):
            await registry.get("a")


async def test_a_redis_that_is_not_there_is_named() -> None:
    with pytest.raises(RegistryAway, match="does not answer"):
        async with open_store(parse_address("redis://127.0.0.1:9")):
            pass


async def test_registries_in_one_redis_do_not_see_each_other(
    redis_url: str, namespace: str
) -> None:
    client = Client(parse_address(redis_url))
    await Registry(RedisStore(client, f"{namespace}-1"), "me").submit(content())
    assert not await all_records(RedisStore(client, f"{namespace}-2"))
    await client.close()
