"""Thousands of clients that leave: before the answer, at its first token, in the middle of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]
import pytest

from tests.faults.asking import KINDS, NAMED, Beside, answering
from tests.faults.bodies import request
from tests.faults.table import Row
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import PATIENCE_S, memory
from tests.server.live import Server
from tests.server.operation.test_live_telemetry import value
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

ROUNDS, A_ROUND = 6, 400
CLIENTS = ROUNDS * A_ROUND
AT_ONCE = 48
WARMING = 200
MOST_GROWTH = 48 << 20
"""Bytes that the last two rounds may leave behind: before, allocators and caches take what they
need, less in each round."""

MOMENTS = ("in mid-body", "before the answer", "at its head", "at the first token", "later")


async def leave(server: Server, dice: random.Random) -> str:
    """One client: asks for a long stream and hangs up at some moment; which it was."""
    body = {**dice.choice(KINDS).body({}), "max_tokens": 150, "stream": True, "n": 1}
    if dice.random() < 0.3:
        body |= {"steering": {**body.get("steering", {}), "report": True}}
    raw, moment = request(server, json.dumps(body).encode()), dice.choice(MOMENTS)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        if moment == "in mid-body":
            writer.write(raw[: -dice.randrange(1, 40)])
            await writer.drain()
            await asyncio.sleep(dice.uniform(0, 0.05))
            return moment
        writer.write(raw)
        await writer.drain()
        if moment == "before the answer":
            await asyncio.sleep(dice.uniform(0, 0.05))
            return moment
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        # Where the server is busy an event has several tokens, and the answer fewer events.
        for _ in range({"at its head": 0, "at the first token": 1}.get(moment, dice.randrange(40))):
            await reader.readuntil(b"data: ")
    except asyncio.IncompleteReadError:
        return "after all of it"
    finally:
        writer.close()
    return moment


async def crowd(server: Server, clients: int, seed: int) -> Counter[str]:
    """So many clients, some at a time; when they left."""
    dice, left = random.Random(seed), Counter[str]()
    todo = iter(range(clients))

    async def one_after_the_other() -> None:
        for _ in todo:
            async with asyncio.timeout(PATIENCE_S):
                left[await leave(server, dice)] += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return left


def idle(server: Server) -> bool:
    """Nothing runs, nothing waits, no block of the cache is held."""
    return server.get("/ready").json()["in_flight"] == 0 and not any(
        value(server, name)
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting",
                     "vllm:kv_cache_usage_perc", "coxswain_in_flight")
    )  # fmt: skip


def counted(server: Server) -> float:
    """Requests that have ended, of any status."""
    return value(server, "coxswain_requests_total")


def connections(server: Server) -> int:
    """Clients' connections that the server holds; those to Redis are its own affair."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(c.laddr.port == server.port and bool(c.raddr) for c in found)


async def test_clients_that_leave_leave_nothing_running(
    server: Server, oracle: Oracle, noted: Callable[[str], Row]
) -> None:
    row = noted("abandoned")
    before = await asyncio.to_thread(answering, server, oracle)
    await crowd(server, WARMING, seed=0)
    await asyncio.to_thread(until, lambda: idle(server), PATIENCE_S)
    sizes = [memory(server)]
    ended, left_499 = counted(server), value(server, "coxswain_requests_total", status="499")
    with Beside(server, oracle, clients=1) as users:
        left = Counter[str]()
        for i in range(ROUNDS):
            left += await crowd(server, A_ROUND, seed=i + 1)
            sizes.append(memory(server))
        over_s = time.monotonic()
    await asyncio.to_thread(until, lambda: idle(server), PATIENCE_S)
    assert await asyncio.to_thread(answering, server, oracle) == before == set(NAMED)
    row.normal_s = time.monotonic() - over_s
    users.into(row)
    assert set(row.saw) == {"right"}
    assert sum(left.values()) == CLIENTS and all(left[m] > CLIENTS // 10 for m in MOMENTS)
    # Each of them is counted, whenever it left.
    others = len(users.ends) + len(NAMED)
    await asyncio.to_thread(until, lambda: counted(server) - ended == CLIENTS + others, 30)
    gone = value(server, "coxswain_requests_total", status="499") - left_499
    assert gone > (CLIENTS - left["after all of it"]) * 0.8, (gone, left)
    row.saw["clients that left"] = CLIENTS
    row.saw["of them counted as 499"] = int(gone)
    await asyncio.to_thread(until, lambda: connections(server) == 0, PATIENCE_S)
    sizes.append(memory(server))
    print(f"\nMiB after each round: {[size >> 20 for size in sizes]}")
    grown = sizes[-1] - sizes[-4]
    row.saw[f"MiB more memory after the last {2 * A_ROUND}"] = grown >> 20
    assert grown < MOST_GROWTH, sizes
    row.loses("adapters", before, answering(server, oracle))
