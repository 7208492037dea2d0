"""A gate in front of a small application, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.context import RequestContext, with_context
from server.errors import HttpError
from server.operation.auth import Auth
from server.operation.gate import Gate
from server.operation.rate_limits import RateLimits
from server.operation.state import ServerState
from server.settings.config import Config
from server.settings.file import parse

BODY_LIMIT = 2000


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and says how long it is."""
    length, more = 0, True
    try:
        while more:
            message = await receive()
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
    except HttpError as error:
        await error(scope, receive, send)
        return
    await JSONResponse({"length": length})(scope, receive, send)


def parsed_config(**config: Any) -> Config:
    server = {"max_body_bytes": BODY_LIMIT, **config.pop("server", {})}
    return parse({"model": "m", "server": server, **config}, Path("/nowhere"), {})


def gate(**config: Any) -> Gate:
    parsed = parsed_config(**config)
    found = Gate(ServerState(), Auth(parsed), parsed.server, parsed.limits, RateLimits.of(parsed))
    found.inner = echo
    found.state.phase = "ready"
    return found


def request_scope(path: str = "/v1/completions") -> Scope:
    """A request as it comes to the gate."""
    return with_context(
        {"type": "http", "method": "POST", "path": path, "headers": []}, RequestContext()
    )


def inside(app: Gate) -> ASGIApp:
    """The gate where each request has its context."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        await app(with_context(scope, RequestContext()), receive, send)

    return outermost


def client(app: Gate, host: str = "127.0.0.1") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(inside(app)), base_url=f"http://{host}")


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
