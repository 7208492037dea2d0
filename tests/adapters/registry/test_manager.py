"""The manager with a real Redis, real files and a loader that reads them: one replica and two."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from adapters.errors import BadSource, Conflict, NoAdapter
from adapters.registry.record import Content
from adapters.registry.registry import Registry
from tests.adapters.registry.kit import Replica, all_records, make_lora, opened, replica, until


async def ready(r: Replica, name: str) -> None:
    await until(lambda: name in r.manager.records and r.manager.records[name].state == "ready")


async def test_an_adapter_goes_from_pending_to_ready_and_answers(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a", 3.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        record = await r.manager.submit("a", str(source), version="7", pin=True, by="me")
        assert record.state == "pending"
        await ready(r, "a")
        found = r.manager.records["a"]
        assert (found.pinned, found.loaded_by, found.want.version) == (True, "me", "7")
        assert found.serving is not None and found.serving.facts is not None
        assert found.serving.facts.kind == "lora" and found.serving.facts.size_bytes == 512
        assert r.answers("a") == 3.0
        loaded = r.manager.lookup("a", "7")
        assert loaded.folder.parent == tmp_path / "store"
        assert loaded.folder.name == loaded.content.digest
        with pytest.raises(NoAdapter, match="this version"):
            r.manager.lookup("a", "8")


async def test_what_does_not_fit_fails_with_the_reason_and_the_old_one_serves_on(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    make_lora(tmp_path / "in/good", 1.0)
    make_lora(tmp_path / "in/wide", 2.0, size=32)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        await r.manager.submit("a", str(tmp_path / "in/good"))
        await ready(r, "a")
        await r.manager.submit("a", str(tmp_path / "in/wide"), replace=True)
        await until(lambda: r.manager.records["a"].state == "failed")
        assert "does not fit the base" in (r.manager.records["a"].reason or "")
        assert r.answers("a") == 1.0
        assert len(r.loader.engine) == 1


async def test_a_taken_name_needs_replace_and_the_old_content_is_unloaded(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    for i in (1, 2):
        make_lora(tmp_path / f"in/{i}", float(i))
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        await r.manager.submit("a", str(tmp_path / "in/1"))
        await ready(r, "a")
        again = await r.manager.submit("a", str(tmp_path / "in/1"))
        assert again.state == "ready", "the same request again changes nothing"
        with pytest.raises(Conflict, match="replace"):
            await r.manager.submit("a", str(tmp_path / "in/2"))
        await r.manager.submit("a", str(tmp_path / "in/2"), replace=True)
        assert r.answers("a") == 1.0, "the old one answers while the new one loads"
        await until(lambda: r.answers("a") == 2.0)
        await until(lambda: r.loader.unloads == 1)
        assert list(r.loader.engine.values()) == [2.0]


async def test_the_same_bytes_under_a_new_version_are_not_loaded_again(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    for folder in ("x", "y"):
        make_lora(tmp_path / "in" / folder, 1.0)
    async with (
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "s1") as r,
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "s2") as other,
    ):
        await r.manager.submit("a", str(tmp_path / "in/x"), version="1")
        await until(lambda: other.answers("a") == 1.0)
        await r.manager.submit("a", str(tmp_path / "in/y"), version="2", replace=True)
        for each in (r, other):
            await until(lambda e=each: e.manager.loaded["a"].content.version == "2")  # type: ignore[misc]
            assert each.manager.lookup("a", "2")
            assert each.loader.loads == 1


async def test_unload_is_everywhere_and_leaves_no_record(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a")
    async with (
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "s1") as one,
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "s2") as two,
    ):
        await one.manager.submit("a", str(source))
        await until(lambda: two.answers("a") == 1.0)
        await two.manager.remove("a")
        with pytest.raises(NoAdapter):
            two.manager.lookup("a")
        for r in (one, two):
            await until(lambda r=r: not r.manager.records and not r.loader.engine)  # type: ignore[misc]
        with pytest.raises(NoAdapter):
            await two.manager.remove("a")


async def test_replicas_converge_also_one_that_starts_later_without_the_source(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a", 5.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "shared") as one:
        await one.manager.submit("a", str(source))
        await ready(one, "a")
        shutil.rmtree(source)
        async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "shared") as two:
            await until(lambda: two.answers("a") == 5.0, 3)
        async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "own") as three:
            await until(lambda: three.manager.failure("a") is not None, 3)
            with pytest.raises(NoAdapter, match="no such folder"):
                three.manager.lookup("a")


async def test_a_replica_refuses_a_source_whose_content_has_changed(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a", 1.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "s1") as one:
        await one.manager.submit("a", str(source))
        await ready(one, "a")
        make_lora(source, 2.0)
        async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "s2") as two:
            await until(lambda: two.manager.failure("a") is not None, 3)
            assert "has other content now" in str(two.manager.failure("a"))
            assert two.answers("a") is None and one.answers("a") == 1.0


async def test_work_of_a_dead_replica_is_taken_over_and_given_up_after_three_attempts(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    make_lora(tmp_path / "in/a", 4.0)
    async with opened(redis_url, namespace) as records:
        dead = Registry(records, "dead")
        want = Content("a", "1", str(tmp_path / "in/a"))
        job = await dead.advance(await dead.submit(want), "downloading")
        assert job is not None and job.attempts == 1
        for name, times in (("twice", 2), ("thrice", 3)):
            job = await dead.submit(Content(name, "1", str(tmp_path / "in/a")))
            for i in range(1, times):
                taken = await Registry(records, f"dead{i}").take(job)
                assert taken is not None
                job = taken
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        await ready(r, "a")
        await ready(r, "twice")
        await until(lambda: r.manager.records["thrice"].state == "failed")
        assert "interrupted 3 times" in (r.manager.records["thrice"].reason or "")
        assert r.answers("a") == r.answers("twice") == 4.0
        assert r.answers("thrice") is None


async def test_bad_names_and_sources_never_reach_the_registry(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = str(make_lora(tmp_path / "in/a"))
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        for name in ("", "a b", "a\n", "../a", "a@1", "x" * 129, "é"):
            with pytest.raises(BadSource, match="name"):
                await r.manager.submit(name, source)
        with pytest.raises(BadSource, match="version"):
            await r.manager.submit("a", source, version="1/2")
        for bad in ("/etc", f"{tmp_path}/in/../..", "ftp://x/y", "http://elsewhere.example/x"):
            with pytest.raises(BadSource):
                await r.manager.submit("a", bad)
        assert not await all_records(r.records)


async def test_other_content_in_the_same_folder_is_a_conflict_not_a_silent_yes(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a", 1.0)
    make_lora(tmp_path / "in/copy", 1.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        await r.manager.submit("a", str(source))
        await ready(r, "a")
        same = await r.manager.submit("a", str(tmp_path / "in/copy"))
        assert same.state == "ready" and same.want.source == str(source)
        make_lora(source, 2.0)
        with pytest.raises(Conflict, match="replace"):
            await r.manager.submit("a", str(source))
        await r.manager.submit("a", str(source), replace=True)
        await until(lambda: r.answers("a") == 2.0)


async def test_orderly_ends_in_the_middle_of_work_are_no_failed_attempts(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a", 1.0)
    folders = (tmp_path / "in", tmp_path / "store")
    for life in range(5):
        async with replica(redis_url, namespace, *folders, pause_s=30.0) as r:
            if life == 0:
                await r.manager.submit("a", str(source))
            await until(lambda r=r: "a" in r.manager.records  # type: ignore[misc]
                        and r.manager.records["a"].state == "loading"
                        and r.manager.records["a"].owner == r.manager.registry.replica)  # fmt: skip
    async with replica(redis_url, namespace, *folders) as r:
        await until(lambda: r.answers("a") == 1.0, 3)


async def test_contents_that_no_record_refers_to_are_deleted(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    for i in (1, 2):
        make_lora(tmp_path / f"in/{i}", float(i))
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        for i in (1, 2):
            await r.manager.submit("a", str(tmp_path / f"in/{i}"), replace=True)
            await until(lambda i=i: r.answers("a") == float(i))  # type: ignore[misc]
        used = r.manager.lookup("a").content.digest
        await until(lambda: r.manager.digests() == {used})  # the registry's word takes a moment
        assert len(r.fetcher.store.digests()) == 2
        assert await r.manager.collect() == [], "too young"
        assert len(await r.manager.collect(older_than_s=0.0)) == 1
        assert r.fetcher.store.digests() == {used}
        await r.manager.remove("a")
        await until(lambda: not r.manager.records)
        assert await r.manager.collect(older_than_s=0.0) == [used]


async def test_a_manager_ends_whenever_it_is_told_to(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    chance = random.Random(1)
    make_lora(tmp_path / "in/a")
    for _ in range(60):
        async with opened(redis_url, namespace) as records:
            one = Replica(records, tmp_path / "in", tmp_path / "store")
            task = asyncio.create_task(one.manager.run())
            await asyncio.sleep(chance.random() * 0.02)
            await one.manager.submit("a", str(tmp_path / "in/a"), replace=True)
            await asyncio.sleep(chance.random() * 0.01)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=5)
            assert done


@pytest.mark.slow
async def test_two_admins_and_two_replicas_at_random_agree_in_the_end(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    values = [1.0, 2.0, 3.0]
    for value in values:
        make_lora(tmp_path / f"in/{value}", value)
    make_lora(tmp_path / "in/wide", 9.0, size=32)
    sources = [str(tmp_path / f"in/{value}") for value in [*values, "wide", "missing"]]
    names = ["a", "b", "c", "d"]

    async def admin(r: Replica, seed: int) -> int:
        chance, done = random.Random(seed), 0
        for _ in range(250):
            name = chance.choice(names)
            try:
                match chance.randrange(4):
                    case 0 | 1:
                        await r.manager.submit(name, chance.choice(sources), replace=True)
                    case 2:
                        await r.manager.registry.pin(name, chance.random() < 0.5, most=2)
                    case 3:
                        await r.manager.remove(name)
                done += 1
            except (Conflict, NoAdapter):
                pass
            if chance.random() < 0.1:
                await asyncio.sleep(0.02)
        return done

    async with (
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "shared") as one,
        replica(redis_url, namespace, tmp_path / "in", tmp_path / "own") as two,
    ):
        counts = await asyncio.gather(*(admin(r, i) for i, r in enumerate((one, two, one, two))))
        assert min(counts) > 50

        def settled() -> bool:
            return one.manager.records == two.manager.records and all(
                record.state in ("ready", "failed") for record in one.manager.records.values()
            )

        await until(settled, 20)
        assert sum(r.pinned for r in one.manager.records.values()) <= 2
        expected = {
            name: float(Path(record.serving.source).name)
            for name, record in one.manager.records.items()
            if record.serving is not None
        }
        for r in (one, two):
            await until(
                lambda r=r: (
                    {n: r.answers(n) for n in r.manager.loaded} == expected  # type: ignore[misc]
                    and sorted(r.loader.engine.values()) == sorted(expected.values())
                )
            )
