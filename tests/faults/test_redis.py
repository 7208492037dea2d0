"""Redis, which holds the registry and the rates, is killed, slow, stopped: inference goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.asking import NAMED, Beside, answering
from tests.faults.conftest import FEW
from tests.faults.proxy import Proxy
from tests.faults.table import Row
from tests.redis_server import RedisServer
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import PATIENCE_S, exact, listing, load, record_of, unload
from tests.server.live import Server
from tests.server.operation.test_live_telemetry import value
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(600)]

LEAST_S = 4.0
"""The fault lasts at least so long: Redis is left alone for 5 s after it did not answer."""

V = {name: Kind(((name, 1.0, None, None),)) for name in ("v0", "v1")}


@contextmanager
def killed(redis: RedisServer, proxy: Proxy) -> Iterator[None]:
    """By the kernel; its supervisor starts it again."""
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGKILL)
    try:
        yield
    finally:
        redis.stop()
        redis.start()


@contextmanager
def slow(redis: RedisServer, proxy: Proxy) -> Iterator[None]:
    """Each answer takes 2 s."""
    proxy.delay_s = 2.0
    try:
        yield
    finally:
        proxy.delay_s = 0.0


@contextmanager
def paused(redis: RedisServer, proxy: Proxy) -> Iterator[None]:
    """It takes connections and bytes, and answers nothing."""
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(redis.pid, signal.SIGCONT)


def write(server: Server, folders: dict[str, Path]) -> dict[str, tuple[int, float]]:
    """A load, an unload and a pin at the same time: the status of each and its seconds."""

    def timed(method: str, path: str, **options: Any) -> tuple[int, float]:
        begun = time.monotonic()
        answer = httpx.request(method, f"{server.url}{path}", timeout=PATIENCE_S,
                               headers=server.key(path), **options)  # fmt: skip
        assert answer.status_code in (200, 202, 503), answer.text
        if answer.status_code == 503:
            assert "Redis does not answer" in answer.text and answer.headers["retry-after"]
        return answer.status_code, time.monotonic() - begun

    body = {"name": "comes", "source": str(folders["v0"])}
    with ThreadPoolExecutor() as pool:
        asked = {
            "load": pool.submit(timed, "POST", "/admin/adapters", json=body),
            "unload": pool.submit(timed, "DELETE", "/admin/adapters/goes"),
            "pin": pool.submit(timed, "POST", "/admin/adapters/a/pin"),
        }
        return {what: one.result() for what, one in asked.items()}


def done(server: Server, oracle: Oracle) -> dict[str, bool]:
    """Which of these changes the registry has, each whole: what is there answers rightly."""

    def settled() -> dict[str, str] | None:
        found = {record["name"]: record["state"] for record in listing(server)["adapters"]}
        return found if set(found.values()) == {"ready"} else None

    states = until(settled, PATIENCE_S)
    for name, content in (("comes", "v0"), ("goes", "v1")):
        if name in states:
            exact(server, V[content].body({content: name}), oracle(V[content]))
    pinned = record_of(server, "a")["pinned"]
    return {"load": "comes" in states, "unload": "goes" not in states, "pin": pinned}


@pytest.mark.parametrize(
    ("fault", "breaks"),
    [("redis-killed", killed), ("redis-slow", slow), ("redis-paused", paused)],
)
def test_inference_goes_on_and_changes_are_done_or_refused(
    server: Server, redis: RedisServer, proxy: Proxy, folders: dict[str, Path], oracle: Oracle,
    fault: str, breaks: Callable[..., Any], noted: Callable[[str], Row],
) -> None:  # fmt: skip
    row = noted(fault)
    load(server, "goes", folders["v1"])
    for kind in V.values():
        oracle(kind)
    before = answering(server, oracle)
    assert before == set(NAMED)
    with Beside(server, oracle) as users:
        with breaks(redis, proxy):
            broken_s = time.monotonic()
            told = write(server, folders)
            key = {"headers": {"authorization": f"Bearer {FEW[fault]}"}}
            statuses = [
                server.post("/v1/completions", Kind().body({}), **key).status_code for _ in range(5)
            ]
            # Nobody is shut out and nobody gets more: the replica counts for itself.
            assert statuses == [200] * 3 + [429] * 2
            until(lambda: value(server, "coxswain_rates_local") == 1, PATIENCE_S)
            if fault != "redis-slow":
                until(lambda: value(server, "coxswain_registry_up") == 0, PATIENCE_S)
            assert server.get("/ready").status_code == 200
            time.sleep(max(0.0, broken_s + LEAST_S - time.monotonic()))
        mended_s = time.monotonic()
        until(lambda: value(server, "coxswain_registry_up") == 1, PATIENCE_S)
        changes = done(server, oracle)
        until(lambda: value(server, "coxswain_rates_local") == 0, PATIENCE_S)
        assert server.post("/admin/adapters/a/unpin", {}).status_code == 200
        row.normal_s = time.monotonic() - mended_s
    users.into(row)
    assert set(row.saw) == {"right"}, row.saw
    for what, (status, seconds) in told.items():
        assert changes[what] or status == 503, (what, status, "was confirmed, and is not there")
        if status != 503:
            row.saw[f"changes made during the fault, in at most {_up(told)} s"] += 1
        elif changes[what]:
            row.saw["changes refused (503) that Redis made afterwards"] += 1
        else:
            row.saw[f"changes refused (503) after at most {_up(told)} s"] += 1
        assert seconds < PATIENCE_S
    row.loses("adapters", before, answering(server, oracle))
    for name in ("comes", "goes"):
        if name in {record["name"] for record in listing(server)["adapters"]}:
            unload(server, name)


def _up(told: dict[str, tuple[int, float]]) -> int:
    """The longest of some times, seconds, rounded up."""
    return int(max(seconds for _, seconds in told.values())) + 1
