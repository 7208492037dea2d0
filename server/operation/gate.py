"""The outermost ASGI application: open before the engine is, closed while draining.

Order for each request: health and readiness → phase → key → body size → load → the caller's
rates → the real application. `/metrics` passes in every phase.
Pure ASGI: Starlette's `BaseHTTPMiddleware` would break the cancellation of running requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.context import RequestContext, context_of
from server.errors import HttpError
from server.operation import metrics
from server.operation.auth import Auth
from server.operation.limits import RequestLimits, last, too_large
from server.operation.rate_limits import RateLimits
from server.operation.state import ServerState
from server.paths import METRICS, PROBES, is_admin, is_model
from server.settings.operating import LimitsConfig, ServerConfig

RETRY_AFTER_S = 5
logger = logging.getLogger("coxswain")


class Gate:
    """The application that the HTTP server runs from its first moment.

    Args:
        state: the phase, kept by `launch`.
        auth: the keys.
        server: section `server`: sizes and counts from which on requests are refused.
        limits: section `limits`: what one request may take.
        rates: what callers may take per minute; None: as much as they like.
    """

    def __init__(
        self,
        state: ServerState,
        auth: Auth,
        server: ServerConfig,
        limits: LimitsConfig | None = None,
        rates: RateLimits | None = None,
    ) -> None:
        self.state, self.auth, self.server = state, auth, server
        self.limits = limits or LimitsConfig()
        self.rates = rates
        self.inner: ASGIApp | None = None
        """The real application, once the engine is up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        path: str = scope["path"]
        context = context_of(scope)
        send = self._heading(context, send)
        try:
            if path in PROBES:
                if scope["method"] not in PROBES[path]:
                    raise HttpError(405, f"{scope['method']} is not possible on {path}")
                await self._probe(path)(scope, receive, send)
                return
            self._refuse_by_phase(path)
            headers = Headers(scope=scope)
            context.access = self.auth.check(scope)
            if self.inner is None:
                await self._early_metrics(scope)(scope, receive, send)
                return
            await self._admit(context, scope, headers)
        except HttpError as error:
            context.refusal = error.reason
            await error(scope, receive, send)
            return
        await self._forward(context, scope, receive, send)

    def _heading(self, context: RequestContext, send: Send) -> Send:
        """Adds the headers that answers of all kinds have.

        Once the server is asked to end, connections are closed after their answer, so that clients
        and load balancers that keep them do not send their next request here.
        """

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *context.headers]}
                if self.state.ending:
                    message = last(message)
            await send(message)

        return sent

    def _probe(self, path: str) -> JSONResponse:
        state = self.state
        status: dict[str, Any] = {"status": state.phase, "in_flight": state.in_flight}
        if state.phase != "ready":
            status["reason"] = state.reason
        ready = path != "/health"
        healthy = state.phase == "ready" if ready else state.phase != "dead"
        if ready and healthy and state.leaving:
            healthy, status["reason"] = False, "the server is asked to end"
        elif ready and healthy and state.silent_s > self.server.engine_timeout_s:
            healthy = False
            status["reason"] = f"the engine has not answered for {state.silent_s:.0f} s"
        retry = {"retry-after": str(RETRY_AFTER_S)}
        return JSONResponse(status, 200 if healthy else 503, None if healthy else retry)

    def _early_metrics(self, scope: Scope) -> Response:
        """So that Prometheus tells a server that loads from one that is not there."""
        if scope["method"] != "GET":
            raise HttpError(405, f"{scope['method']} is not possible on {scope['path']}")
        return Response(metrics.page_without_engine(self.state), media_type=CONTENT_TYPE_LATEST)

    def _refuse_by_phase(self, path: str) -> None:
        state = self.state
        if path == METRICS:
            return  # of a server that ended badly, too, until its process is gone
        if self.inner is None or state.phase in ("starting", "dead"):
            raise HttpError(503, f"The server is {state.phase}: {state.reason}", code=state.phase,
                            retry_after_s=RETRY_AFTER_S, reason=state.phase)  # fmt: skip
        if state.phase == "draining" and is_model(path):
            raise HttpError(503, "The server is draining and takes no new requests.",
                            code="draining", retry_after_s=RETRY_AFTER_S,
                            reason="draining")  # fmt: skip

    async def _admit(self, context: RequestContext, scope: Scope, headers: Headers) -> None:
        """Counts a request for its caller's rates, and notes in its headers what they leave.

        Raises:
            HttpError: 413, 429.
        """
        refusal = self._too_much(scope["path"], headers)
        if self.rates is not None and _rated(scope):
            counts = refusal is None and scope["method"] == "POST"
            standing = await self.rates.admit(
                context.access.caller, context.access.rate, count=counts
            )
            context.headers = standing.headers
            refusal = refusal or (standing.refusal if counts else None)
        if refusal is not None:
            raise refusal

    def _too_much(self, path: str, headers: Headers) -> HttpError | None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.server.max_body_bytes:
            return too_large(self.server.max_body_bytes)
        most = self.server.max_in_flight
        if self.state.in_flight >= most and is_model(path):
            return HttpError(429, f"The server is at its limit of {most} requests.",
                             retry_after_s=1, reason="queue_full")  # fmt: skip
        return None

    async def _forward(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        assert self.inner is not None
        limited = RequestLimits(scope, receive, send, self.server, self.limits)
        counts = is_model(scope["path"])
        if counts:
            self.state.enter()
        try:
            await self.inner(scope, limited.receive, limited.send)
            await limited.finish()
        except asyncio.CancelledError:
            # The HTTP server ends and this request did not finish in time.
            await limited.break_off(
                HttpError(503, "The server ended before it could answer.", code="draining",
                          retry_after_s=RETRY_AFTER_S)
            )  # fmt: skip
        except Exception as error:
            # Starlette answers 500 and raises again; the application has logged it by now, and
            # raising further would close the client's connection.
            if limited.open and not context.left:
                logger.error("a request failed in the middle of its answer", exc_info=error)
                await limited.break_off(HttpError(500, "Internal error; the server's log has the "
                                                  "details."))  # fmt: skip
        finally:
            if counts:
                self.state.leave()
            if self.rates is not None and _rated(scope):
                caller, tokens = context.access, context.prompt_tokens + context.output_tokens
                self.rates.charge(caller.caller, caller.rate, tokens)


def _rated(scope: Scope) -> bool:
    """Whether its caller's rates concern a request."""
    return is_model(scope["path"]) and not is_admin(scope["path"])
