"""A way to Redis that can be made slow."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Proxy:
    """Passes what comes to a TCP port on to a unix socket, in a thread of its own.

    Args:
        target: the socket; one that nobody listens on makes it close what it took.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.delay_s = 0.0
        """How long each piece of an answer is held back."""
        self.port = 0

    @property
    def url(self) -> str:
        """For redis-py."""
        return f"redis://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        """With its thread around it."""
        ready, loop = threading.Event(), asyncio.new_event_loop()

        async def serve() -> None:
            server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            with contextlib.suppress(asyncio.CancelledError):
                await server.serve_forever()

        task = loop.create_task(serve())
        thread = threading.Thread(target=loop.run_until_complete, args=(task,))
        thread.start()
        try:
            assert ready.wait(10)
            yield self
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join()
            for left in asyncio.all_tasks(loop):
                left.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            inside, into = await asyncio.open_unix_connection(self.target)
            await asyncio.gather(
                self._pump(reader, into, slow=False), self._pump(inside, writer, slow=True)
            )
        writer.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, slow: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                if slow:
                    await asyncio.sleep(self.delay_s)
                sink.write(piece)
                await sink.drain()
        sink.close()
