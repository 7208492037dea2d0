"""Server-sent events of the OpenAI API: what we add to vLLM's streams, and how they start."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from server import errors

DONE = "data: [DONE]\n\n"
_ERROR = 'data: {"error"'


async def opened(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream whose first event is there.

    vLLM checks some parameters only when the engine takes the request. Waiting for the first
    event before the headers leave turns what is wrong into a 4xx answer instead of an error
    inside a stream that began with 200.

    Raises:
        HttpError: the stream begins with an error.
    """
    try:
        first = await anext(events)
    except StopAsyncIteration:
        first = DONE
    if first.startswith(_ERROR):
        await events.aclose()
        raise errors.from_vllm(json.loads(first.removeprefix("data: "))["error"])
    return _rest(first, events)


async def _rest(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        yield first
        async for event in events:
            if event.startswith(_ERROR):
                error = json.loads(event.removeprefix("data: "))["error"]
                event = errors.event(errors.from_vllm(error))
            yield event


async def with_report(
    events: AsyncGenerator[str, None], report: Callable[[], dict[str, Any] | None]
) -> AsyncGenerator[str, None]:
    """A stream with one more chunk before the end: no choices, and the `steering` object.

    Args:
        events: vLLM's.
        report: the object once the request is finished; None if it did not finish.
    """
    head: dict[str, Any] | None = None
    async with aclosing(events):
        async for event in events:
            if event == DONE and head is not None and (found := report()) is not None:
                yield f"data: {json.dumps({**head, 'choices': [], 'steering': found})}\n\n"
            elif head is None and event.startswith("data: {") and not event.startswith(_ERROR):
                chunk = json.loads(event.removeprefix("data: "))
                head = {key: chunk.get(key) for key in ("id", "object", "created", "model")}
            yield event
