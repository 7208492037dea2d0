"""The outermost ASGI application: makes each request's context, and tells how the request ended."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.context import RequestContext, with_context
from server.operation import metrics
from server.operation.logs import request_line
from server.operation.tracing import Tracing
from server.paths import is_inference
from server.settings.operating import LoggingConfig

HEADER = "x-request-id"

USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A client's own id that can be put into logs and headers; for others a new one is made."""


def with_ids(app: ASGIApp) -> ASGIApp:
    """Gives each request an id: the client's own, or a new one. It is in the request's headers
    from then on, in those of the answer, and in every log record of the request.
    """
    return CorrelationIdMiddleware(
        app, HEADER, validator=lambda request_id: bool(USABLE_ID.fullmatch(request_id))
    )


class AccessLog:
    """Counts, logs and traces inference requests, refused ones too. Inside `with_ids`.

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
        context = RequestContext(correlation_id.get() or "")
        scope = with_context(scope, context)
        watch = _Watch(context, receive, send)
        method, path, span = scope["method"], scope["path"], None
        if self.tracing is not None and is_inference(scope):
            span, below = self.tracing.begin(f"{method} {path}", Headers(scope=scope))
            scope = _with_headers(scope, below)
        try:
            await self.app(scope, watch.receive, watch.send)
        finally:
            context.resources.close()
            if context.refusal is not None:
                metrics.REFUSALS.labels(context.refusal).inc()
            if is_inference(scope):
                metrics.observe(context)
                request_line(context, self.logging, method, path)
            if self.tracing is not None and span is not None:
                self.tracing.end(span, context)


def _with_headers(scope: Scope, span_headers: Mapping[str, str]) -> Scope:
    """The request with headers of our span, below which vLLM puts its own."""
    ours = [(name.encode(), value.encode()) for name, value in span_headers.items()]
    names = {name for name, _ in ours}
    headers = [pair for pair in scope["headers"] if pair[0] not in names]
    return {**scope, "headers": [*headers, *ours]}


class _Watch:
    """Notes how one request ends, from its messages."""

    def __init__(self, context: RequestContext, receive: Receive, send: Send) -> None:
        self._context, self._receive, self._send = context, receive, send
        self._complete = False

    async def receive(self) -> MutableMapping[str, Any]:
        """As the server's."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._context.left = True
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """As the server's."""
        if message["type"] == "http.response.start":
            self._context.sent_status = message["status"]
        elif message["type"] == "http.response.body":
            self._complete |= not message.get("more_body")
        await self._send(message)
