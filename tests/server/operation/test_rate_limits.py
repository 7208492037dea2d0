"""Limits per key and minute: one count for all replicas with a Redis, one each without."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis import Redis

from adapters.registry.address import parse_address
from server.errors import HttpError
from server.operation import rate_limits as module
from server.operation.rate_limits import RateLimits
from server.settings.operating import Rate
from tests.redis_server import RedisServer, SentinelServer, free_port


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    found.start()
    yield found
    found.stop()


@asynccontextmanager
async def replicas(url: str | None, namespace: str, **rate: int) -> AsyncIterator[list[RateLimits]]:
    found = [
        RateLimits(Rate(**rate), parse_address(url) if url else None, namespace) for _ in range(2)
    ]
    try:
        yield found
    finally:
        for each in found:
            await each.close()


async def admit(rates: RateLimits, caller: str = "a", rate: Rate | None = None) -> None:
    assert (await rates.admit(caller, rate)).refusal is None


async def refusal(rates: RateLimits, caller: str = "a", rate: Rate | None = None) -> HttpError:
    found = (await rates.admit(caller, rate)).refusal
    assert found is not None and found.status == 429
    return found


async def headers(rates: RateLimits, *, count: bool = False) -> dict[str, str]:
    found = await rates.admit("a", None, count=count)
    return {name.decode().removeprefix("x-ratelimit-"): text.decode()
            for name, text in found.headers}  # fmt: skip


async def settled(rates: RateLimits) -> None:
    await asyncio.gather(*rates._charging)


async def test_replicas_share_the_requests_of_a_key(redis: RedisServer) -> None:
    async with replicas(redis.url, "requests", requests_per_minute=3) as (one, two):
        for replica in (one, two, one):
            await admit(replica)
        for replica in (one, two):
            error = await refusal(replica)
            assert error.reason == "requests_per_minute"
            assert 55 <= (error.retry_after_s or 0) <= 60
        await admit(two, "b")


async def test_replicas_share_the_tokens_of_a_key(redis: RedisServer) -> None:
    async with replicas(redis.url, "tokens", tokens_per_minute=100) as (one, two):
        await admit(one)
        one.charge("a", None, 99)
        await settled(one)
        await admit(two)
        two.charge("a", None, 1)
        await settled(two)
        error = await refusal(one)
        assert error.reason == "tokens_per_minute"
        assert "100 tokens per minute" in error.message


async def test_many_at_once_never_pass_the_limit(redis: RedisServer) -> None:
    async with replicas(redis.url, "many", requests_per_minute=20) as both:
        # More than a pool of redis-py has connections, which is not a Redis that is away.
        answers = await asyncio.gather(*(both[i % 2].admit("a", None) for i in range(600)))
        assert not any(replica.away for replica in both)
    assert sum(answer.refusal is None for answer in answers) == 20
    assert all(answer.taken[0] <= 20 for answer in answers)


@pytest.mark.parametrize("shared", [True, False])
async def test_a_window_ends_and_another_begins(
    redis: RedisServer, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_S", 1)
    url = redis.url if shared else None
    async with replicas(url, "ends", requests_per_minute=1, tokens_per_minute=5) as (one, _):
        await admit(one)
        one.charge("a", None, 5)
        await settled(one)
        assert (await refusal(one)).retry_after_s == 1
        await asyncio.sleep(1.05)
        await admit(one)
        assert (await refusal(one)).reason == "requests_per_minute"


async def test_a_window_does_not_outlast_a_clock_that_was_set_back(redis: RedisServer) -> None:
    """Set back by an hour, Redis's clock makes every window an hour longer."""
    async with replicas(redis.url, "back", requests_per_minute=1, tokens_per_minute=5) as (one, _):
        await admit(one)
        one.charge("a", None, 5)
        await settled(one)
        with Redis(unix_socket_path=str(redis.socket)) as client:
            for what in ("requests", "tokens"):
                client.pexpire(f"{{back:rates:a}}:{what}", 3_660_000)
            assert (await refusal(one)).retry_after_s == 60
            for what in ("requests", "tokens"):
                left_ms = client.pttl(f"{{back:rates:a}}:{what}")
                assert isinstance(left_ms, int) and 0 < left_ms <= 60_000


async def test_a_key_s_own_rate_takes_the_place_of_the_default() -> None:
    async with replicas(None, "own", requests_per_minute=1) as (one, _):
        own, free = Rate(requests_per_minute=2), Rate()
        for _ in range(2):
            await admit(one, "a", own)
        assert (await refusal(one, "a", own)).message.startswith("This key's limit of 2 requests")
        for _ in range(5):
            await admit(one, "b", free)


async def test_while_redis_is_away_each_replica_counts_for_itself(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.2)
    server = RedisServer(tmp_path_factory.mktemp("away"))
    server.start()
    try:
        async with replicas(server.url, "away", requests_per_minute=2) as (one, two):
            await admit(one)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)  # it neither answers nor refuses
            began = time.monotonic()
            for replica in (one, two):
                for _ in range(2):
                    await admit(replica)
                assert replica.away
                await refusal(replica)
            assert time.monotonic() - began < 6 * 2 * module.ANSWER_S
            os.kill(server.pid, signal.SIGCONT)
            await asyncio.sleep(0.3)
            # What it had not answered it has counted by now, and here it counted too: late, the
            # caller gets less than its limit, never more.
            for replica in (one, two):
                await admit(replica, "b")
                assert not replica.away
            await refusal(one, "b")
    finally:
        server.stop()
    said = [record.getMessage() for record in caplog.records]
    assert sum("counts for itself" in line for line in said) == 2
    assert sum("answers again" in line for line in said) == 2


@pytest.mark.parametrize("shared", [True, False])
async def test_answers_tell_what_is_left(redis: RedisServer, shared: bool) -> None:
    url = redis.url if shared else None
    async with replicas(url, "told", requests_per_minute=2, tokens_per_minute=100) as (one, _):
        fresh = {
            "limit-requests": "2", "remaining-requests": "2", "reset-requests": "0s",
            "limit-tokens": "100", "remaining-tokens": "100", "reset-tokens": "0s",
        }  # fmt: skip
        assert await headers(one) == fresh  # nothing is counted by looking
        assert await headers(one) == fresh
        begun = {**fresh, "remaining-requests": "1", "reset-requests": "1m0s"}
        assert await headers(one, count=True) == begun
        one.charge("a", None, 130)
        await settled(one)
        used_up = {**begun, "remaining-tokens": "0", "reset-tokens": "1m0s"}
        assert await headers(one, count=True) == used_up  # refused ones do not count
        assert await headers(one) == used_up


async def test_only_what_is_limited_is_told() -> None:
    async with replicas(None, "half", tokens_per_minute=5) as (one, _):
        assert set(await headers(one)) == {"limit-tokens", "remaining-tokens", "reset-tokens"}
    async with replicas(None, "none") as (one, _):
        assert await headers(one, count=True) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.2, "1s"), (1, "1s"), (59.01, "1m0s"), (60, "1m0s"), (360, "6m0s"), (61, "1m1s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert module.duration(seconds) == text


async def shared_by_two(url: str) -> None:
    async with replicas(url, "kinds", requests_per_minute=3, tokens_per_minute=9) as (one, two):
        for replica in (one, two, one):
            await admit(replica)
            replica.charge("a", None, 1)
            await settled(replica)
        assert (await refusal(two)).reason == "requests_per_minute"
        assert (await two.admit("a", None, count=False)).taken == (3, 3)
        assert not one.away and not two.away


async def test_a_server_behind_a_sentinel_counts(tmp_path: Path) -> None:
    master = RedisServer(tmp_path / "master", free_port())
    sentinel = SentinelServer(tmp_path / "sentinel", free_port(), "main", master.port)
    try:
        master.start()
        sentinel.start()
        await shared_by_two(f"redis+sentinel://127.0.0.1:{sentinel.port}/main/0")
    finally:
        sentinel.stop()
        master.stop()


async def test_a_cluster_counts(tmp_path: Path) -> None:
    node = RedisServer(tmp_path / "node", free_port(), cluster_enabled="yes")
    try:
        node.start()
        with node.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            client.response_callbacks.pop("CLUSTER INFO", None)
            for _ in range(500):
                if b"cluster_state:ok" in client.execute_command("CLUSTER INFO"):
                    break
                await asyncio.sleep(0.02)
        await shared_by_two(f"redis+cluster://127.0.0.1:{node.port}")
    finally:
        node.stop()


async def test_without_limits_redis_is_not_asked() -> None:
    rates = RateLimits(Rate(), parse_address("redis://127.0.0.1:1/0"))
    await rates.admit("a", None)
    rates.charge("a", None, 10)
    assert not rates.away
    await rates.close()
