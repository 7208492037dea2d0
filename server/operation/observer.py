"""The outermost ASGI application: gives each request its id, and notes how it ended."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from server.operation import metrics
from server.operation.auth import is_admin
from server.operation.logs import request_line
from server.operation.tracing import Tracing
from server.settings.operating import LoggingConfig
from server.trail import Trail, begin, request_id

LEFT = 499
"""The status of a request whose client left before its answer was complete."""

HEADER = "x-request-id"


class Observer:
    """Counts, logs and traces inference requests, refused ones too.

    Args:
        app: the gate.
        logging: section `logging`.
        tracing: makes spans; None: there are none.
    """

    def __init__(
        self, app: ASGIApp, logging: LoggingConfig | None = None, tracing: Tracing | None = None
    ) -> None:
        self.app = app
        self.logging = logging or LoggingConfig()
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        trail = Trail(request_id(headers.get(HEADER)))
        begin(trail)
        watch = _Watch(trail, receive, send)
        method, path = scope["method"], scope["path"]
        own, span = {HEADER: trail.id}, None
        if self.tracing is not None and is_inference(scope):
            span, below = self.tracing.begin(f"{method} {path}", headers)
            own |= below
        try:
            await self.app(_with(scope, own), watch.receive, watch.send)
        finally:
            if trail.refusal is not None:
                metrics.REFUSALS.labels(trail.refusal).inc()
            if is_inference(scope):
                metrics.observe(trail, watch.status)
                request_line(trail, self.logging, method, path, watch.status)
            if self.tracing is not None and span is not None:
                self.tracing.end(span, trail, watch.status)


def is_inference(scope: Scope) -> bool:
    """Whether a request asks the model for something."""
    path: str = scope["path"]
    return scope["method"] == "POST" and path.startswith("/v1/") and not is_admin(path)


def _with(scope: Scope, own: Mapping[str, str]) -> Scope:
    """The request with headers of ours: the id, which vLLM puts into its own ids, and our span,
    below which vLLM puts its own.
    """
    ours = [(name.encode(), value.encode()) for name, value in own.items()]
    names = {name for name, _ in ours}
    headers = [pair for pair in scope["headers"] if pair[0] not in names]
    return {**scope, "headers": [*headers, *ours]}


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
