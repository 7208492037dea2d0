"""How streams begin and end, without an engine: events that fail, are late, or are not read."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send
from vllm.exceptions import GenerationError, RetryableRequestError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from adapters.errors import FilesLost, NoRoom
from server.context import RequestContext, context_of
from server.errors import HttpError, TooLong
from server.operation.access_log import AccessLog
from server.operation.limits import RequestLimits
from server.routes.sse import streamed
from server.settings.operating import LimitsConfig, LoggingConfig, ServerConfig
from steering.errors import BadValue

CREATED = 'event: response.created\ndata: {"type": "response.created"}\n\n'
FIRST = 'data: {"n": 1}\n\n'


class Client:
    """Reads one answer, and leaves after so many messages."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.messages: list[Message] = []
        self.leaves_after = leaves_after
        self.left = asyncio.Event()
        if leaves_after == 0:
            self.left.set()
        self.asked = False

    async def receive(self) -> Message:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if len(self.messages) == self.leaves_after:
            self.left.set()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.messages).decode()


class Events:
    """Events of a stream.

    Args:
        texts: in front of the end; a number is a pause in seconds.
        error: the end; None: it goes well.
    """

    def __init__(self, *texts: str | float, error: Exception | None = None) -> None:
        self.texts, self.error, self.over = texts, error, False

    async def __call__(self) -> AsyncGenerator[str, None]:
        try:
            for text in self.texts:
                if isinstance(text, str):
                    yield text
                else:
                    await asyncio.sleep(text)
            if self.error is not None:
                raise self.error
        finally:
            self.over = True


async def answered(
    events: Events, client: Client, *, path: str = "/v1/completions", every_s: float = 30.0,
    wait: bool = True, seconds: float = 600.0,
) -> RequestContext:  # fmt: skip
    """One request through access log, limits and stream."""
    seen: list[RequestContext] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        seen.append(context)
        limits = RequestLimits(
            scope, receive, send, ServerConfig(), LimitsConfig(request_timeout_s=seconds)
        )
        request = Request(scope, limits.receive)
        await request.body()
        answer = await streamed(events(), request, context, every_s, wait=wait)
        await answer(scope, limits.receive, limits.send)
        await limits.finish()

    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"",
        "asgi": {"spec_version": "2.3"},
    }  # fmt: skip
    await AccessLog(app, LoggingConfig(requests=True))(scope, client.receive, client.send)
    return seen[0]


ENDS: list[tuple[Exception, int, str]] = [
    (EngineDeadError(), 503, "dead"),
    (EngineGenerateError(), 500, "internal_error"),
    (GenerationError("The stream 'plain' gives scores that are NaN"), 500, "internal_error"),
    (RetryableRequestError("no room"), 503, "unavailable"),
    (NoRoom("no room"), 503, "unavailable"),
    (FilesLost("an adapter's files are gone"), 503, "unavailable"),
    (HttpError(504, "late"), 504, "request_timeout"),
    (VLLMValidationError("the constraints leave no token"), 400, "invalid_value"),
    (BadValue("no", field="steering"), 400, "invalid_value"),
    (TooLong("no", field="prompt"), 400, "context_length_exceeded"),
    (ValueError("a bug"), 500, "internal_error"),
    (KeyError("a bug"), 500, "internal_error"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(("error", "status", "code"), ENDS, ids=lambda v: type(v).__name__)
async def test_what_ends_a_stream_is_its_status_and_its_last_event(
    error: Exception, status: int, code: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coxswain")
    client = Client()
    context = await answered(Events(FIRST, error=error), client, path=path)
    assert (client.status, context.sent_status, context.status) == (200, 200, status)
    last = json.loads(client.text.strip().rsplit("data: ", 1)[1])
    if path == "/v1/responses":
        assert (last["type"], last["sequence_number"]) == ("error", 1)
    told = last if path == "/v1/responses" else last["error"]
    assert told["code"] == code
    assert "bug" not in told["message"]
    line = next(r.fields for r in caplog.records if r.name == "coxswain.requests")  # type: ignore[attr-defined]
    assert (line["status"], line["sent_status"], line["failure"]) == (status, 200, code)
    logged = [r for r in caplog.records if r.exc_info is not None]
    assert bool(logged) == (isinstance(error, ValueError | KeyError | EngineGenerateError))


@pytest.mark.parametrize("first", [(), (CREATED,)], ids=["nothing", "created"])
async def test_what_fails_before_the_first_event_of_the_engine_is_raised(
    first: tuple[str, ...],
) -> None:
    events = Events(*first, error=BadValue("no", field="steering"))
    with pytest.raises(BadValue):
        await answered(events, Client())
    assert events.over


async def test_a_stream_that_waits_sends_comments() -> None:
    client = Client()
    context = await answered(Events(0.3, FIRST, 0.3, FIRST), client, every_s=0.05)
    assert client.text.count(": keep-alive\n\n") >= 4
    assert client.text.count(FIRST) == 2
    assert context.status == 200


async def test_without_an_interval_there_are_no_comments() -> None:
    client = Client()
    await answered(Events(0.1, FIRST, 0.1, FIRST), client, every_s=0)
    assert client.text == FIRST * 2


async def test_headers_leave_at_once_where_nothing_is_to_be_waited_for() -> None:
    client = Client(leaves_after=1)
    events = Events(3600, FIRST)
    context = await asyncio.wait_for(answered(events, client, wait=False), 5)
    assert (client.status, context.status) == (200, 499)
    assert events.over


@pytest.mark.parametrize("messages", [0, 1, 2, 3])
@pytest.mark.parametrize("wait", [False, True])
async def test_a_client_that_leaves_ends_the_events(messages: int, wait: bool) -> None:
    events = Events(FIRST, FIRST, 3600)
    client = Client(leaves_after=messages)
    context = await asyncio.wait_for(answered(events, client, wait=wait), 5)
    assert events.over, "closed with the request, not by the garbage collector"
    assert context.status == 499


async def test_a_time_out_ends_a_stream_with_an_event_and_counts_as_one() -> None:
    client = Client()
    events = Events(FIRST, 3600)
    context = await asyncio.wait_for(answered(events, client, seconds=0.2), 5)
    assert context.status == 504
    assert json.loads(client.text.strip().rsplit("data: ", 1)[1])["error"]["code"] == (
        "request_timeout"
    )
    assert events.over


async def test_a_complete_answer_is_not_broken_off() -> None:
    """A server that ends may cancel a request whose answer is out already."""
    client = Client()
    scope: dict[str, Any] = {"type": "http", "path": "/v1/x", "state": {"context": (
        context := RequestContext())}}  # fmt: skip
    limits = RequestLimits(scope, client.receive, client.send, ServerConfig(), LimitsConfig())
    await limits.send({"type": "http.response.start", "status": 200, "headers": []})
    await limits.send({"type": "http.response.body", "body": b"{}"})
    await limits.break_off(HttpError(503, "ended"))
    assert (len(client.messages), context.failure) == (2, None)
