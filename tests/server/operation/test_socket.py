"""The listening socket."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from server.operation.listening import bind
from server.settings.operating import ServerConfig


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_answers_leave_at_once(host: str) -> None:
    """An answer is written in two pieces; the second must not wait for the first's receipt, which
    clients hold back for 40 ms.
    """
    try:
        sock = bind(ServerConfig(host=host, port=0))
    except OSError:
        pytest.skip(f"no {host} here")
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own: Any = writer.get_extra_info("socket")
        found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(connected, sock=sock):
        host, port = sock.getsockname()[:2]
        _, writer = await asyncio.open_connection(host, port)
        assert await found
        writer.close()
