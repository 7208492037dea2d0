"""A Redis that forgets: restored from an older copy, emptied, or exchanged for an empty one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import RegistryAway
from adapters.registry.feed import Feed
from adapters.registry.record import Content
from adapters.registry.registry import Registry
from tests.adapters.registry.kit import all_records, make_lora, opened, replica, until
from tests.redis_server import RedisServer


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that may be stopped."""
    found = RedisServer(tmp_path / "redis")
    found.start()
    yield found
    found.stop()


def content(name: str) -> Content:
    return Content(name, "1", f"/{name}")


async def test_a_restored_redis_that_counts_the_same_writes_again_is_read_anew(
    redis: RedisServer, tmp_path: Path
) -> None:
    """A replica that compares how many writes there were keeps what is lost, for good."""
    async with opened(redis.url, "x") as mine, opened(redis.url, "x") as other:
        feed, admin = Feed(mine, "me", lambda _: None), Registry(other, "you")
        await admin.submit(content("kept"))
        redis.stop()
        shutil.copytree(redis.directory, tmp_path / "older")
        redis.start()
        await admin.submit(content("lost"))
        await feed.look()
        assert feed.records.keys() == {"kept", "lost"}
        redis.stop()
        shutil.rmtree(redis.directory)
        (tmp_path / "older").rename(redis.directory)
        redis.start()
        await admin.submit(content("new"))
        await feed.look()
        assert feed.records == await all_records(other)
        assert not feed.trusts_leases, "those of the others may be lost too"
        assert feed.records.keys() == {"kept", "new"}
        assert feed.losses == 1


async def test_replicas_put_back_what_a_flushed_redis_has_lost_and_serve_on(
    redis_url: str, namespace: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_lora(tmp_path / "in/a", 1.0)
    make_lora(tmp_path / "in/b", 2.0)
    folders = (tmp_path / "in", tmp_path / "store")
    async with (
        replica(redis_url, namespace, *folders) as one,
        replica(redis_url, namespace, *folders) as two,
    ):
        await one.manager.submit("a", str(tmp_path / "in/a"), pin=True)
        await until(lambda: one.answers("a") == two.answers("a") == 1.0)
        before = dict(one.manager.records)
        async with opened(redis_url, namespace) as store:
            await store.client.redis.delete(*await store.client.redis.keys(f"{{{namespace}}}:*"))
            # Nobody answers as if there were no adapter, and nobody writes into the emptied one.
            for verb in (one.manager.registry.get, one.manager.registry.remove):
                with pytest.raises(RegistryAway, match="lost the registry"):
                    await verb("a")
            for each in (one, two):
                await until(lambda e=each: e.manager.feed.losses == 1)  # type: ignore[misc]
            assert one.answers("a") == two.answers("a") == 1.0
            after = await all_records(store)
        assert after["a"].want == before["a"].want and after["a"].pinned
        assert one.loader.unloads == two.loader.unloads == 0
        assert "Redis has lost the registry" in caplog.text
        await two.manager.submit("b", str(tmp_path / "in/b"))
        await until(lambda: one.answers("b") == 2.0)
        async with replica(redis_url, namespace, *folders) as later:
            await until(lambda: later.answers("a") == 1.0 and later.answers("b") == 2.0)


async def test_what_is_new_in_the_other_redis_stays_as_it_is(
    redis_url: str, namespace: str
) -> None:
    async with opened(redis_url, namespace) as mine, opened(redis_url, namespace) as other:
        feed = Feed(mine, "me", lambda _: None)
        admin = Registry(other, "you")
        for name in ("a", "b"):
            await admin.submit(content(name))
        await feed.look()
        await other.client.redis.delete(*await other.client.redis.keys(f"{{{namespace}}}:*"))
        new = await admin.submit(Content("a", "2", "/else"))
        await feed.look()
        assert feed.records["a"] == new and feed.records["b"].want == content("b")
        assert feed.records == await all_records(other)
