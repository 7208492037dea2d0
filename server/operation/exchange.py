"""The messages of one request and its answer, bounded in size and in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Receive, Scope, Send

from server import errors
from server.errors import HttpError
from server.settings.operating import LimitsConfig, ServerConfig

_CLOSE = (b"connection", b"close")


class Exchange:
    """Stands between the HTTP server and the application for one request.

    Once the request's time is over the application is told that the client has left, which frees
    everything as if it had; what it still says is dropped, and the client gets an error.

    Args:
        scope, receive, send: the server's.
        server: section `server`.
        limits: section `limits`.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        server: ServerConfig,
        limits: LimitsConfig,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._max_bytes, self._limits = server.max_body_bytes, limits
        now = asyncio.get_running_loop().time()
        self._body_end, self._end = now + limits.body_timeout_s, now + limits.request_timeout_s
        self._read, self._whole = 0, False
        self._late, self._complete, self._streams = False, False, False
        self._unread = False
        """The body is not read to its end, so the connection cannot be used again."""
        self.begun = False
        """Whether the status is out."""

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message from the client.

        Raises:
            HttpError: 413, the body is too large, also one without a length; 408, it is too slow.
        """
        if self._late:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._end if self._whole else self._body_end):
                message = await self._receive()
        except TimeoutError:
            if not self._whole:
                self._unread = True
                raise self._slow() from None
            self._late = not self._complete
            return {"type": "http.disconnect"}
        self._whole |= message["type"] != "http.request" or not message.get("more_body")
        self._read += len(message.get("body", b""))
        if self._read > self._max_bytes:
            self._unread = True
            raise too_large(self._max_bytes)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """A message of the application to the client."""
        if self._late:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            headers = message.setdefault("headers", [])
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in headers
            )
            if self._unread:
                message = last(message)
        elif message["type"] == "http.response.body":
            self._complete |= not message.get("more_body")
        await self._send(message)

    async def finish(self) -> None:
        """Tells the client that its time was over, if it was."""
        if not self._late:
            return
        error = HttpError(504, "The request took longer than limits.request_timeout_s "
                          f"({self._limits.request_timeout_s:g} s).")  # fmt: skip
        if not self.begun:
            await error(self._scope, self._receive, self._send)
            return
        text = self._event(error) if self._streams else ""
        await self._send({"type": "http.response.body", "body": text.encode()})

    def _event(self, error: HttpError) -> str:
        if self._scope["path"] != "/v1/responses":
            return errors.event(error)
        told = {"type": "error", "code": "request_timeout", "param": None, "message": error.message}
        return f"event: error\ndata: {json.dumps(told)}\n\n"

    def _slow(self) -> HttpError:
        return HttpError(
            408,
            "The request body was not there after limits.body_timeout_s "
            f"({self._limits.body_timeout_s:g} s).",
            reason="body_timeout",
        )


def last(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The head of an answer after which the connection is closed."""
    headers = message.get("headers", [])
    return message if _CLOSE in headers else {**message, "headers": [*headers, _CLOSE]}


def too_large(most: int) -> HttpError:
    """413.

    Args:
        most: bytes that a body may have.
    """
    return HttpError(413, f"The request body is larger than {most} bytes.",
                     reason="body_too_large")  # fmt: skip
