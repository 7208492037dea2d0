"""The least of the OpenAI completions API that vLLM's benchmark client needs, for baselines.

Streams only, greedy only, end tokens never end: what `load_tests.load` asks of every server.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Generate = Callable[[list[int], int], AsyncIterator[int]]
"""(prompt's token ids, how many to draw) → the tokens as they come."""


def application(tokenizer: Any, generate: Generate) -> Starlette:
    """The ASGI application.

    Args:
        tokenizer: of `transformers`.
        generate: draws tokens.
    """

    async def completions(request: Request) -> Response:
        body = await request.json()
        refused = [k for k in ("steering", "adapters") if k in body]
        if refused or body.get("temperature") != 0 or not body.get("ignore_eos"):
            message = "this baseline decodes greedily, to max_tokens, and takes no steering"
            return JSONResponse({"error": {"message": message}}, 400)
        ids = tokenizer(body["prompt"], add_special_tokens=False).input_ids
        events = _events(tokenizer, generate, ids, body["max_tokens"])
        return StreamingResponse(events, media_type="text/event-stream")

    async def health(_: Request) -> Response:
        return Response()

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/health", health),
        ]
    )


async def _events(
    tokenizer: Any, generate: Generate, ids: list[int], count: int
) -> AsyncIterator[str]:
    async for token in generate(ids, count):
        text = tokenizer.decode([token]) + " "
        yield _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
    usage = {"prompt_tokens": len(ids), "completion_tokens": count}
    yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def serve(application: Starlette, port: int) -> None:
    """Serves on loopback until it is stopped."""
    uvicorn.run(application, host="127.0.0.1", port=port, log_level="warning")
