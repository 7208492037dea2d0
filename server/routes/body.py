"""Bodies are parsed by us: FastAPI's parser takes NaN, and says little about broken JSON."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from server.errors import HttpError
from server.validation import DEEPEST, too_deep


def strict_json(raw: bytes) -> object:
    """Parses a request body.

    Raises:
        HttpError: 400, the bytes are not JSON (also `NaN`, numbers beyond a float, and half a
            surrogate pair), or nested too deeply.
    """
    try:
        parsed: object = msgspec.json.decode(raw.removeprefix(codecs.BOM_UTF8))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HttpError(400, f"The request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep() from error
    if too_deep(raw, parsed):
        raise _too_deep()
    return parsed


def _too_deep() -> HttpError:
    return HttpError(400, f"The request body is nested too deeply; allowed: {DEEPEST} levels.")


class StrictRoute(APIRoute):
    """A route whose JSON body is parsed by `strict_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind our parser."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if request.method in ("POST", "PUT") and kind.endswith("json"):
                raw = await request.body()
                if raw:
                    # FastAPI's handler asks `request.json()`, which answers from this field.
                    request._json = strict_json(raw)
            return await handler(request)

        return strict
