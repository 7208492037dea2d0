"""The outermost ASGI application: open before the engine is, closed while draining.

Order for each request: health and readiness → phase → key → body size → load → the caller's
rates → the real application.
Pure ASGI: Starlette's `BaseHTTPMiddleware` would break the cancellation of running requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import HttpError
from server.operation.auth import Auth, access, is_admin
from server.operation.exchange import Exchange, last, too_large
from server.operation.rates import Rates
from server.operation.state import Life
from server.settings.operating import LimitsConfig, ServerConfig
from server.trail import trail
from server.validation import DEEPEST, odd_value, too_deep

RETRY_AFTER_S = 5
logger = logging.getLogger("coxswain")
_INFERENCE = ("/v1/", "/tokenize", "/detokenize")


class Gate:
    """The application that the HTTP server runs from its first moment.

    Args:
        life: the phase, kept by `launch`.
        auth: the keys.
        server: section `server`: sizes and counts from which on requests are refused.
        limits: section `limits`: what one request may take.
        rates: what callers may take per minute; None: as much as they like.
    """

    def __init__(
        self,
        life: Life,
        auth: Auth,
        server: ServerConfig,
        limits: LimitsConfig | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.life, self.auth, self.server = life, auth, server
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
        send = self._parting(send)
        try:
            if path in ("/health", "/ready"):
                if scope["method"] not in ("GET", "HEAD"):
                    raise HttpError(405, f"{scope['method']} is not possible on {path}")
                await self._probe(path)(scope, receive, send)
                return
            self._refuse_by_phase(path)
            headers = Headers(scope=scope)
            allowed = self.auth.check(path, headers)
            access.set(allowed)
            trail().caller = allowed.caller
            self._refuse_by_length(headers)
            self._refuse_by_load(path)
            if self.rates is not None and _counts(scope):
                await self.rates.admit(allowed.caller, allowed.rate)
        except HttpError as error:
            await error(scope, receive, send)
            return
        await self._forward(scope, receive, send)

    def _parting(self, send: Send) -> Send:
        """Closes connections after their answer once the server is asked to end, so that clients
        and load balancers that keep them do not send their next request here.
        """

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and self.life.ending:
                message = last(message)
            await send(message)

        return sent

    def _probe(self, path: str) -> JSONResponse:
        life = self.life
        status: dict[str, Any] = {"status": life.phase, "in_flight": life.in_flight}
        if life.phase != "ready":
            status["reason"] = life.reason
        healthy = life.phase != "dead" if path == "/health" else life.phase == "ready"
        if path == "/ready" and healthy and life.leaving:
            healthy, status["reason"] = False, "the server is asked to end"
        elif path == "/ready" and healthy and life.silent_s > self.server.engine_timeout_s:
            healthy = False
            status["reason"] = f"the engine has not answered for {life.silent_s:.0f} s"
        retry = {"retry-after": str(RETRY_AFTER_S)}
        return JSONResponse(status, 200 if healthy else 503, None if healthy else retry)

    def _refuse_by_phase(self, path: str) -> None:
        life = self.life
        if self.inner is None or life.phase in ("starting", "dead"):
            raise HttpError(503, f"The server is {life.phase}: {life.reason}", code=life.phase,
                            retry_after_s=RETRY_AFTER_S, reason=life.phase)  # fmt: skip
        if life.phase == "draining" and path.startswith(_INFERENCE):
            raise HttpError(503, "The server is draining and takes no new requests.",
                            code="draining", retry_after_s=RETRY_AFTER_S,
                            reason="draining")  # fmt: skip

    def _refuse_by_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.server.max_body_bytes:
            raise too_large(self.server.max_body_bytes)

    def _refuse_by_load(self, path: str) -> None:
        most = self.server.max_in_flight
        if self.life.in_flight >= most and path.startswith(_INFERENCE):
            raise HttpError(429, f"The server is at its limit of {most} requests.",
                            retry_after_s=1, reason="queue_full")  # fmt: skip

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.inner is not None
        exchange = Exchange(scope, receive, send, self.server, self.limits)
        counts = scope["path"].startswith(_INFERENCE)
        if counts:
            self.life.enter()
        try:
            await self.inner(scope, exchange.receive, exchange.send)
            await exchange.finish()
        except asyncio.CancelledError:
            # The HTTP server ends and this request did not finish in time.
            if not exchange.begun:
                await HttpError(503, "The server ended before it could answer.", code="draining",
                                retry_after_s=RETRY_AFTER_S)(scope, receive, send)  # fmt: skip
        except Exception:
            # Starlette answers 500 and raises again; the application has logged it by now, and
            # raising further would close the client's connection.
            logger.debug("passed on from the application", exc_info=True)
        finally:
            if counts:
                self.life.leave()
            if self.rates is not None and _counts(scope):
                found, noted = access.get(), trail()
                tokens = noted.prompt_tokens + noted.output_tokens
                self.rates.charge(found.caller, found.rate, tokens)


def _counts(scope: Scope) -> bool:
    """Whether a request counts for its caller's rates."""
    path: str = scope["path"]
    return scope["method"] == "POST" and path.startswith(_INFERENCE) and not is_admin(path)


def strict_json(raw: bytes) -> object:
    """Parses a request body.

    Raises:
        HttpError: 400, the bytes are not JSON, or contain a number that JSON does not have.
    """
    try:
        # Left to itself Python reads UTF-16 too, and half a surrogate pair as it stands: neither
        # would be seen by what scans the bytes below.
        parsed: object = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"The request body is not valid JSON: {error}") from error
    if too_deep(raw, parsed):
        raise HttpError(400, f"The request body is nested too deeply; allowed: {DEEPEST} levels.")
    odd = odd_value(raw, parsed)
    if odd is not None:
        path, must = odd
        raise HttpError(400, f"{path}: {must}", param=path)
    return parsed
