"""Bodies are parsed by us: FastAPI's parser takes NaN, and says little about broken JSON."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from server.gate import strict_json


class StrictRoute(APIRoute):
    """A route whose JSON body has finite numbers only."""

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
