"""Thousands of adapters: what a change costs the others, and what a start asks of the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters.registry import feed as feeds
from adapters.registry import redis_store
from adapters.registry import store as stores
from adapters.registry.connection import open_store
from adapters.registry.feed import Feed
from adapters.registry.record import Content, Record
from adapters.registry.registry import Registry
from adapters.registry.store import NOWHERE, Store, new_token
from tests.adapters.registry.kit import all_records, make_lora, opened, replica, until
from tests.adapters.sources.servers import Server, folder, held_back

MANY = 3000


async def fill(store: Store, count: int, letter: str = "n") -> None:
    """Registers adapters, some at a time."""
    for i in range(0, count, 100):
        names = [f"{letter}{j}" for j in range(i, min(i + 100, count))]
        records = [Record(Content(n, "1", f"/{n}"), "failed", 0.0, 0.0) for n in names]
        await asyncio.gather(*(store.swap(r.name, "", r, new_token()) for r in records))


@pytest.fixture(params=["redis", "file"])
def place(request: pytest.FixtureRequest) -> str:
    """Where the registry is."""
    return str(request.param)


async def test_a_tick_of_a_download_is_no_change(
    redis_url: str, namespace: str, tmp_path: Path, place: str
) -> None:
    async with opened(redis_url, namespace) if place == "redis" else open_store(tmp_path) as store:
        job = await Registry(store, "me").submit(Content("a", "1", "/a"))
        position = (await store.look(NOWHERE)).position
        await store.tell_progress("a", job.job, 7)
        found = await store.look(position)
        assert not found.records and found.position == position
        assert await store.progress({"a": job.job, "b": "x"}) == {"a": 7}
        assert await store.progress({"a": "another job"}) == {}


async def test_only_what_changed_is_read(
    redis_url: str, namespace: str, tmp_path: Path, place: str
) -> None:
    async with opened(redis_url, namespace) if place == "redis" else open_store(tmp_path) as store:
        await fill(store, 50)
        told: list[list[str]] = []
        feed, admin = Feed(store, "me", told.append), Registry(store, "you")
        await feed.look()
        assert sum(map(len, told)) == 50
        told.clear()
        await admin.submit(Content("n7", "2", "/x"))
        await admin.remove("n9")
        assert await admin.forget(await admin.get("n9"))
        await feed.look()
        assert sorted(name for names in told for name in names) == ["n7", "n9"]
        assert feed.records == await all_records(store) and "n9" not in feed.records


async def test_who_is_far_behind_reads_everything_in_pieces(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (redis_store, feeds):
        monkeypatch.setattr(module, "LOG", 200)
    async with opened(redis_url, namespace) as store, opened(redis_url, namespace) as other:
        feed = Feed(store, "me", lambda _: None)
        await fill(other, 100)
        await feed.look()
        await fill(other, MANY, "m")
        await feed.look()
        assert feed.records == await all_records(other) and len(feed.records) == 100 + MANY
        assert feed.losses == 0


async def test_more_changes_than_one_look_takes_come_in_order(
    redis_url: str, namespace: str
) -> None:
    assert stores.LOG > 2 * 600
    async with opened(redis_url, namespace) as store:
        feed = Feed(store, "me", lambda _: None)
        await fill(store, 1, "m")
        await feed.look()
        await fill(store, 600)
        first = await store.look(feed._position)
        assert first.more and not first.whole and len(first.records) < 600
        await feed.look()
        assert feed.records == await all_records(store)


async def test_silent_downloads_hold_back_no_load_from_a_folder(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    answers = folder(make_lora(tmp_path / "late", 2.0), "/late")
    free = held_back(answers, "/late/adapter_model.safetensors")
    good = make_lora(tmp_path / "in/good", 1.0)
    with Server(answers).running() as web:
        try:
            async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store",
                               remotes=(web.url,)) as r:  # fmt: skip
                for i in range(8):
                    await r.manager.submit(f"x{i}", f"{web.url}/late")
                await until(lambda: r.manager.records["x0"].state == "downloading")
                await r.manager.submit("good", str(good))
                await until(lambda: r.answers("good") == 1.0, 5)
                states = [r.manager.records[f"x{i}"].state for i in range(8)]
                assert sorted(set(states)) == ["downloading", "pending"], "no more than may"
        finally:
            free.set()


async def test_a_start_asks_the_engine_for_what_is_pinned_only(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    folders = (tmp_path / "in", tmp_path / "store")
    async with replica(redis_url, namespace, *folders) as r:
        for name in ("a", "b"):
            source = make_lora(tmp_path / "in" / name, float(ord(name)))
            await r.manager.submit(name, str(source), pin=name == "b")
            await until(lambda n=name: r.answers(n) == float(ord(n)))  # type: ignore[misc]
    async with replica(redis_url, namespace, *folders) as later:
        await until(lambda: later.manager.loaded.keys() == {"a", "b"})
        assert later.loader.asked == [("b", True), ("a", False)]
