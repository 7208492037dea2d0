"""The heads of HTTP requests, bounded in time and in size. uvicorn bounds neither."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import errors
from server.operation import metrics
from server.settings.operating import ServerConfig

MOST_BYTES = 1 << 16
"""Largest request headers that may come in pieces; HAProxy, nginx and Node take 8 to 64 KiB."""


class BoundedHeads(HttpToolsProtocol):
    """One connection. Without a request it is kept for `keep_alive_s`, also before the first one; a
    head that has begun must be complete after `head_timeout_s`.
    """

    settings = ServerConfig()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and may be silent for a while."""
        super().connection_made(transport)
        self._begun = False
        self._bytes = 0
        self._timer = self.loop.call_later(self.settings.keep_alive_s, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._begun, self._bytes = True, 0
        self._wait()

    def on_headers_complete(self) -> None:
        """The last byte of its head."""
        self._timer.cancel()
        self._begun = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        begun = self._begun
        super().data_received(data)
        unasked = self.timeout_keep_alive_task is None and not (self._begun or self._answering)
        if unasked and self._timer.cancelled():
            self._wait()  # empty lines between two requests: uvicorn would wait on for a head
        if begun and self._begun:
            self._bytes += len(data)
            if self._bytes > MOST_BYTES:
                self._refuse(431, f"The request's head is larger than {MOST_BYTES} bytes.",
                             "head_too_large")  # fmt: skip

    def _wait(self) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(self.settings.head_timeout_s, self._late)

    def _late(self) -> None:
        if self._answering:  # the head of a next request, which came early; nothing waits for it
            self._wait()
            return
        seconds = self.settings.head_timeout_s
        self._refuse(408, "The request's head was not there after server.head_timeout_s "
                     f"({seconds:g} s).", "head_timeout")  # fmt: skip

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Answers, unless that would be in the middle of another answer, and closes."""
        self._timer.cancel()
        self._begun = False
        metrics.REFUSALS.labels(reason).inc()
        if not self._answering:
            body = json.dumps(errors.body(status, message, code=reason)).encode()
            self.transport.write(
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                "content-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                + body
            )
        self.transport.close()


def bounded(settings: ServerConfig) -> type[BoundedHeads]:
    """Uvicorn's `http` for a server with these settings."""
    members: dict[str, Any] = {"settings": settings}
    return type("BoundedHeads", (BoundedHeads,), members)
