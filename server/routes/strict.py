"""Bodies are parsed by us: FastAPI's parser takes NaN, and says little about broken JSON."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from server.errors import HttpError
from server.operation.gate import strict_json

logger = logging.getLogger("coxswain")

_READERS = re.compile(
    r"/vllm/(entrypoints/.+/protocol|entrypoints/openai/responses/utils"
    r"|entrypoints/.*chat_utils|renderers/.+)\.py"
)
"""Where vLLM reads requests: validators that run before the types are checked, and what makes
messages of them. An item or attribute that they miss was missing in the request."""


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
            try:
                return await handler(request)
            except (AttributeError, LookupError) as error:
                if not while_reading(error):
                    raise
                logger.debug("a request that vLLM's reader trips over", exc_info=error)
                raise HttpError(400, "A part of the request is empty, missing or of the wrong "
                                f"type: {error}") from error  # fmt: skip

        return strict


def while_reading(error: Exception) -> bool:
    """Whether an error came from vLLM's reading of a request, not from answering it."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    within = [file for file in files if "/vllm/" in file]
    return bool(within and _READERS.search(within[-1]))
