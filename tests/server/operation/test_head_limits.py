"""Heads that do not end, in time or in size, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send

from server.operation.head_limits import MOST_BYTES, bounded
from server.settings.operating import ServerConfig

BEGUN = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that takes a while where its path says so."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1.6)
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    settings = ServerConfig(head_timeout_s=1, keep_alive_s=3)
    server = uvicorn.Server(uvicorn.Config(
        answering, port=0, lifespan="off", log_config=None, http=bounded(settings),
        timeout_keep_alive=3,
    ))  # fmt: skip
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


def refused(reason: str) -> float:
    return REGISTRY.get_sample_value("coxswain_refusals_total", {"reason": reason}) or 0


async def code_of(reader: asyncio.StreamReader) -> tuple[int, str]:
    """The status and the error's code of an answer after which the connection is closed."""
    answer = await asyncio.wait_for(reader.read(), 5)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_a_whole_request_is_answered_and_the_next_one_too(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        for piece in (BEGUN, b"a: b\r\n", b"\r\n"):
            writer.write(piece)
            await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(1.2)  # longer than a head may take
    writer.close()


async def test_a_head_that_drips_is_cut_off(port: int) -> None:
    before = refused("head_timeout")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(BEGUN)

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.05)
            writer.write(b"a: b\r\n")

    dripping = asyncio.create_task(drip())
    assert await code_of(reader) == (408, "head_timeout")
    dripping.cancel()
    assert refused("head_timeout") == before + 1


async def test_a_head_without_end_is_cut_off(port: int) -> None:
    before = refused("head_too_large")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(BEGUN)
    with contextlib.suppress(ConnectionError):
        for _ in range(2 + MOST_BYTES // 1000):
            writer.write(b"a: " + b"x" * 995 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)
    assert await code_of(reader) == (431, "head_too_large")
    assert refused("head_too_large") == before + 1


async def test_who_says_nothing_is_sent_away(port: int) -> None:
    reader, _ = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_a_next_head_that_is_early_and_slow_does_not_cut_an_answer(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + BEGUN)
    answer = await asyncio.wait_for(reader.readuntil(b"ok"), 5)
    assert answer.startswith(b"HTTP/1.1 200")
    assert await code_of(reader) == (408, "head_timeout")


async def test_empty_lines_between_requests_do_not_hold_a_connection(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(BEGUN + b"\r\n")
    await asyncio.wait_for(reader.readuntil(b"ok"), 5)
    writer.write(b"\r\n")
    assert await code_of(reader) == (408, "head_timeout")
