"""The outermost ASGI application: open before the engine is, closed while draining.

Order for each request: health and readiness → phase → key → body size → load → the real
application.
Pure ASGI: Starlette's `BaseHTTPMiddleware` would break the cancellation of running requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import Auth, access
from server.config import ServerConfig
from server.errors import HttpError
from server.state import Life
from server.validation import odd_value

RETRY_AFTER_S = 5
logger = logging.getLogger("coxswain")
_INFERENCE = ("/v1/", "/tokenize", "/detokenize")


class Gate:
    """The application that the HTTP server runs from its first moment.

    Args:
        life: the phase, kept by `launch`.
        auth: the keys.
        limits: section `server`: sizes and counts from which on requests are refused.
    """

    def __init__(self, life: Life, auth: Auth, limits: ServerConfig) -> None:
        self.life = life
        self.auth = auth
        self.max_body_bytes = limits.max_body_bytes
        self.max_in_flight = limits.max_in_flight
        self.inner: ASGIApp | None = None
        """The real application, once the engine is up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        path: str = scope["path"]
        try:
            if path in ("/health", "/ready"):
                if scope["method"] not in ("GET", "HEAD"):
                    raise HttpError(405, f"{scope['method']} is not possible on {path}")
                await self._probe(path)(scope, receive, send)
                return
            self._refuse_by_phase(path)
            headers = Headers(scope=scope)
            access.set(self.auth.check(path, headers))
            self._refuse_by_length(headers)
            self._refuse_by_load(path)
        except HttpError as error:
            await error(scope, receive, send)
            return
        await self._forward(path, scope, receive, send)

    def _probe(self, path: str) -> JSONResponse:
        life = self.life
        status: dict[str, Any] = {"status": life.phase, "in_flight": life.in_flight}
        if life.phase != "ready":
            status["reason"] = life.reason
        healthy = life.phase != "dead" if path == "/health" else life.phase == "ready"
        retry = {"retry-after": str(RETRY_AFTER_S)}
        return JSONResponse(status, 200 if healthy else 503, None if healthy else retry)

    def _refuse_by_phase(self, path: str) -> None:
        life = self.life
        if self.inner is None or life.phase in ("starting", "dead"):
            raise HttpError(503, f"The server is {life.phase}: {life.reason}", code=life.phase,
                            retry_after_s=RETRY_AFTER_S)  # fmt: skip
        if life.phase == "draining" and path.startswith(_INFERENCE):
            raise HttpError(503, "The server is draining and takes no new requests.",
                            code="draining", retry_after_s=RETRY_AFTER_S)  # fmt: skip

    def _refuse_by_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise self._too_large()

    def _refuse_by_load(self, path: str) -> None:
        if self.life.in_flight >= self.max_in_flight and path.startswith(_INFERENCE):
            raise HttpError(429, f"The server is at its limit of {self.max_in_flight} requests.",
                            retry_after_s=1)  # fmt: skip

    def _too_large(self) -> HttpError:
        return HttpError(413, f"The request body is larger than {self.max_body_bytes} bytes.")

    async def _forward(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.inner is not None
        read = 0

        async def counted() -> MutableMapping[str, Any]:
            """Also bodies without a length (chunked) must not grow past the limit."""
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise self._too_large()
            return message

        begun = False

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        counts = path.startswith(_INFERENCE)
        if counts:
            self.life.enter()
        try:
            await self.inner(scope, counted, noted)
        except asyncio.CancelledError:
            # The HTTP server ends and this request did not finish in time.
            if not begun:
                await HttpError(503, "The server ended before it could answer.", code="draining",
                                retry_after_s=RETRY_AFTER_S)(scope, receive, send)  # fmt: skip
        except Exception:
            # Starlette answers 500 and raises again; the application has logged it by now, and
            # raising further would close the client's connection.
            logger.debug("passed on from the application", exc_info=True)
        finally:
            if counts:
                self.life.leave()


def strict_json(raw: bytes) -> object:
    """Parses a request body.

    Raises:
        HttpError: 400, the bytes are not JSON, or contain a number that JSON does not have.
    """
    try:
        parsed: object = json.loads(raw)
        odd = odd_value(raw, parsed)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"The request body is not valid JSON: {error}") from error
    if odd is not None:
        path, must = odd
        raise HttpError(400, f"{path}: {must}", param=path)
    return parsed
