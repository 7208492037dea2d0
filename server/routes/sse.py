"""Server-sent events: what we add to vLLM's streams, how they start, and how they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from server import errors
from server.context import RequestContext
from server.requests.failures import http_error

DONE = "data: [DONE]\n\n"
_DELTA = "event: message_delta\ndata: "
"""The event of Anthropic's API that tells why a reply ended, and its usage."""

_LAST = ("response.completed", "response.incomplete")
_FIRST = ("event: response.created", "event: response.in_progress")
"""Events that a stream of the Responses API has before the engine knows of the request."""

Events = AsyncGenerator[str, None]
Reports = Callable[[], "dict[str, Any] | None"]
"""Gives the `steering` object once the request is finished; None if there is none."""


async def completion_events(events: Events, report: Reports | None) -> Events:
    """A stream of chat or text completions, with one more chunk before its end: no choices, and the
    `steering` object.

    Args:
        events: vLLM's.
        report: None: the response gets none.
    """
    head: dict[str, Any] | None = None
    async with aclosing(events):
        async for event in events:
            if event == DONE and report and head is not None and (steering := report()) is not None:
                yield f"data: {json.dumps({**head, 'choices': [], 'steering': steering})}\n\n"
            elif report and head is None and event.startswith("data: {"):
                chunk = json.loads(event.removeprefix("data: "))
                head = {key: chunk.get(key) for key in ("id", "object", "created", "model")}
            yield event


async def message_events(events: Events, report: Reports | None) -> Events:
    """A stream of Anthropic's API; its `message_delta` carries the `steering` object."""
    async with aclosing(events):
        async for event in events:
            if report and event.startswith(_DELTA) and (steering := report()) is not None:
                data = json.loads(event.removeprefix(_DELTA))
                event = f"{_DELTA}{json.dumps({**data, 'steering': steering})}\n\n"
            yield event


async def response_events(events: AsyncGenerator[Any, None], report: Reports | None) -> Events:
    """A stream of the Responses API; its last event carries the `steering` object."""
    async with aclosing(events):
        async for event in events:
            kind = getattr(event, "type", "unknown")
            data = event.model_dump(mode="json", by_alias=True)
            if "response" in data:
                data["response"]["store"] = False
            if report and kind in _LAST and (steering := report()) is not None:
                data["response"]["steering"] = steering
            yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def streamed(
    events: Events, request: Request, context: RequestContext, every_s: float, *, wait: bool
) -> StreamingResponse:
    """The response of a stream.

    vLLM checks some parameters only when the engine takes the request. Waiting for the first event
    that the engine had a part in, before the headers leave, turns what is wrong into a 4xx answer
    instead of an error inside a stream that began with 200. A proxy would take a long silence for
    the end, so the wait has one; from then on comments keep the connection.

    Args:
        events: they raise what ends them.
        request: whose they are.
        context: of the request.
        every_s: seconds of silence after which a comment is sent; 0: never.
        wait: whether to wait for the first event at all.

    Raises:
        Exception: the stream begins with an error.
    """
    begin = asyncio.create_task(_begin(events))
    context.resources.callback(begin.cancel)  # a response that nobody begins to read
    try:
        if wait:
            await asyncio.wait({begin}, timeout=every_s or None)
            if begin.done():
                begin.result()
    except BaseException:
        await _end(begin, events)
        raise
    body = with_sse_keep_alive(_told(begin, events, request.scope["path"], context), every_s)
    return _Stream(body, begin, events)


class _Stream(StreamingResponse):
    """Closes its events as soon as it ends, also where its client has left before the first."""

    def __init__(self, body: Events, begin: asyncio.Task[list[str]], events: Events) -> None:
        super().__init__(body, media_type="text/event-stream")
        self._body, self._begin, self._events = body, begin, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._body.aclose()
            await _end(self._begin, self._events)


async def _begin(events: Events) -> list[str]:
    """The events up to the first one that the engine had a part in."""
    first = []
    async for event in events:
        first.append(event)
        if not event.startswith(_FIRST):
            break
    return first


async def _told(
    begin: asyncio.Task[list[str]], events: Events, path: str, context: RequestContext
) -> Events:
    """The events; an error, which the status cannot tell any more, is the last of them."""
    try:
        for event in await begin:
            context.events += 1
            yield event
        async for event in events:
            context.events += 1
            yield event
    except Exception as error:
        failure = http_error(error, context.fields)
        context.fail(failure)
        yield errors.event(path, failure, context.events)
    finally:
        await _end(begin, events)


async def _end(begin: asyncio.Task[list[str]], events: Events) -> None:
    """Ends what makes the events; it cannot be closed while it makes one."""
    begin.cancel()
    await asyncio.wait({begin})
    await events.aclose()
