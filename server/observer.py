"""The outermost ASGI application: gives each request its id, and notes how it ended."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from server import metrics
from server.auth import is_admin
from server.trail import Trail, begin, request_id

LEFT = 499
"""The status of a request whose client left before its answer was complete."""

HEADER = "x-request-id"


class Observer:
    """Counts inference requests and their time, refused ones too.

    Args:
        app: the gate.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trail = Trail(request_id(Headers(scope=scope).get(HEADER)))
        begin(trail)
        watch = _Watch(trail, receive, send)
        try:
            await self.app(_with_id(scope, trail.id), watch.receive, watch.send)
        finally:
            if trail.refusal is not None:
                metrics.REFUSALS.labels(trail.refusal).inc()
            if is_inference(scope):
                metrics.observe(trail, watch.status)


def is_inference(scope: Scope) -> bool:
    """Whether a request asks the model for something."""
    path: str = scope["path"]
    return scope["method"] == "POST" and path.startswith("/v1/") and not is_admin(path)


def _with_id(scope: Scope, identifier: str) -> Scope:
    """The request with the id that we call it by: vLLM puts it into its own ids."""
    name = HEADER.encode()
    headers = [pair for pair in scope["headers"] if pair[0] != name]
    return {**scope, "headers": [*headers, (name, identifier.encode())]}


class _Watch:
    """Looks at one request's messages as they pass."""

    def __init__(self, trail: Trail, receive: Receive, send: Send) -> None:
        self._trail, self._receive, self._send = trail, receive, send
        self._status, self._complete, self._left = 500, False, False

    @property
    def status(self) -> int:
        """Of the answer."""
        return LEFT if self._left else self._status

    async def receive(self) -> MutableMapping[str, Any]:
        """As the server's."""
        message = await self._receive()
        self._left |= message["type"] == "http.disconnect" and not self._complete
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """As the server's; the answer carries the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message).append(HEADER, self._trail.id)
        elif message["type"] == "http.response.body":
            self._complete |= not message.get("more_body")
        await self._send(message)
