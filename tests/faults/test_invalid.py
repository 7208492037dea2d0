"""A flood of requests that cannot be answered, and good ones beside it that must be."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.faults import bodies
from tests.faults.asking import NAMED, Beside, answering, seconds, typical_s
from tests.faults.bodies import CLOSED
from tests.faults.table import Row
from tests.faults.test_abandoned import connections, counted, idle
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import PATIENCE_S, memory
from tests.server.adapting.test_stress import GROWTH
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

FLOOD = 5000
AT_ONCE = 24
DRIPPING = 64
WARMING = 400
STARVED_S = 30.0
"""No good request may take that long: alone they take some hundredths of a second."""


async def answer(server: Server, raw: bytes, *, waits: bool) -> int:
    """The status that some bytes are answered with; 0: the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                writer.write(raw)
                await writer.drain()
                if waits:
                    line = await reader.readline()
                    return int(line.split()[1]) if line else CLOSED
        return CLOSED
    except ConnectionError:
        return CLOSED
    finally:
        writer.close()


async def flood(server: Server, count: int, seed: int) -> Counter[str]:
    """So many bad requests, some at a time; (kind, status) → how many."""
    dice, found = random.Random(seed), Counter[str]()
    todo, odd = iter(range(count)), list[object]()

    async def one_after_the_other() -> None:
        for i in todo:
            kind = bodies.ALL[i % len(bodies.ALL)]
            raw, allowed = kind(server, dice)
            status = await answer(server, raw, waits=kind is not bodies.unfinished)
            if status not in allowed:
                odd.append((kind.__name__, status, raw[-200:]))
            found[f"{status or 'closed'}"] += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    assert not odd, "\n".join(map(str, odd))
    return found


async def drip(server: Server, over: asyncio.Event) -> list[int]:
    """Clients that send a byte now and then, until they are cut off; then they come again."""
    statuses = []
    raw = bodies.request(server, b'{"model": "big"', content_length=10_000)
    while not over.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with contextlib.suppress(ConnectionError):
            writer.write(raw)
            line = asyncio.create_task(reader.readline())
            while not line.done():
                writer.write(b" ")
                await writer.drain()
                await asyncio.wait([line], timeout=0.5)
            statuses.append(int(line.result().split()[1]))
        writer.close()
    return statuses


async def test_good_requests_stay_right_and_are_not_starved(
    server: Server, oracle: Oracle, noted: Callable[[str], Row]
) -> None:
    row = noted("invalid")
    before = await asyncio.to_thread(answering, server, oracle)
    await flood(server, WARMING, seed=0)
    with Beside(server, oracle) as users:
        await asyncio.sleep(3)
    alone_s = typical_s(users.ends)
    await asyncio.to_thread(until, lambda: idle(server), PATIENCE_S)
    size, ended = memory(server), counted(server)
    with Beside(server, oracle) as users:
        over = asyncio.Event()
        dripping = [asyncio.create_task(drip(server, over)) for _ in range(DRIPPING)]
        found = await flood(server, FLOOD, seed=1)
        over.set()
        dripped = Counter(status for one in await asyncio.gather(*dripping) for status in one)
        over_s = time.monotonic()
    assert await asyncio.to_thread(answering, server, oracle) == before == set(NAMED)
    row.normal_s = time.monotonic() - over_s
    await asyncio.to_thread(until, lambda: idle(server), PATIENCE_S)
    users.into(row)
    assert set(row.saw) == {"right"}, row.saw
    assert len(users.ends) > 20 and max(seconds(users.ends)) < STARVED_S
    assert set(dripped) == {408} and dripped[408] >= DRIPPING
    assert sum(found.values()) == FLOOD and counted(server) > ended
    print(f"\nmedian of good requests: {alone_s:.3f} s alone, {typical_s(users.ends):.3f} s beside")
    for status, count in found.items():
        row.saw[f"bad ones {'refused ' * status.isdigit()}{status}"] += count
    row.saw["dripping ones refused 408"] += dripped[408]
    await asyncio.to_thread(until, lambda: connections(server) == 0, PATIENCE_S)
    grown = memory(server) - size
    row.saw["MiB more memory afterwards"] = grown >> 20
    assert grown < GROWTH
    row.loses("adapters", before, answering(server, oracle))
