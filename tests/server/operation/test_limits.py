"""Bounds of one request in time: slow bodies and slow answers end, and free what they held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.operation.gate import Gate
from tests.server.operation.gates import bearer, client, echo, error_of, gate, request_scope


def timed(**limits: float) -> Gate:
    return gate(limits=limits)


async def slow_stream(scope: Scope, receive: Receive, send: Send) -> None:
    """One event, and then nothing until the client is gone."""

    async def events() -> AsyncIterator[bytes]:
        yield b'data: {"token": 1}\n\n'
        await asyncio.Event().wait()

    await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)


async def silent(_scope: Scope, receive: Receive, _send: Send) -> None:
    """Answers nothing, and ends when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def test_a_request_that_takes_too_long_is_told_504_and_ends() -> None:
    app = timed(request_timeout_s=0.2)
    app.inner = silent
    async with client(app) as http:
        answer = await http.post("/v1/completions", content=b"{}")
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "request_timeout"
    assert "limits.request_timeout_s (0.2 s)" in error_of(answer)["message"]
    assert app.state.in_flight == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
async def test_a_stream_that_takes_too_long_ends_with_an_error(path: str) -> None:
    app = timed(request_timeout_s=0.2)
    app.inner = slow_stream
    async with client(app) as http:
        answer = await http.post(path, content=b"{}")
    assert answer.status_code == 200
    first, last = [e for e in answer.text.split("\n\n") if e]
    assert first == 'data: {"token": 1}'
    told = json.loads(last.partition("data: ")[2])
    code = told["code"] if path == "/v1/responses" else told["error"]["code"]
    assert code == "request_timeout"
    assert last.startswith("event: error") == (path == "/v1/responses")
    assert app.state.in_flight == 0


async def test_an_answer_in_time_is_left_alone() -> None:
    app = timed(request_timeout_s=5, body_timeout_s=5)
    async with client(app) as http:
        answer = await http.post("/v1/completions", content=b"x" * 100)
    assert answer.json() == {"length": 100}


async def test_a_body_that_does_not_come_is_told_408_and_the_connection_is_closed() -> None:
    async def dripping() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)
        yield b"}"

    app = timed(body_timeout_s=0.2)
    app.inner = echo
    scope = request_scope()
    parts = dripping()
    sent = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": await anext(parts), "more_body": True}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await app(scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]  # type: ignore[operator]
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"  # type: ignore[arg-type]
    assert app.state.in_flight == 0


async def test_while_leaving_connections_are_closed_after_their_answer() -> None:
    """Also those of refusals, of probes, and of requests that came before."""
    app = gate()
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await go_on.wait()
        await echo(scope, receive, send)

    async with client(app) as http:
        assert "connection" not in (await http.get("/v1/models")).headers
        app.inner = slow
        early = asyncio.create_task(http.post("/v1/completions"))
        await begun.wait()
        app.state.leaving = True
        ready = await http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["status"] == "ready"
        go_on.set()
        taken = await http.get("/v1/models")
        app.state.phase = "draining"
        refused = await http.get("/v1/models")
    assert taken.status_code == 200 and refused.status_code == 503
    for answer in (ready, await early, taken, refused):
        assert answer.headers.get_list("connection") == ["close"]


async def test_an_engine_that_does_not_answer_makes_the_server_not_ready_until_it_does() -> None:
    app = gate(server={"engine_timeout_s": 5})
    async with client(app) as http:
        assert (await http.get("/ready")).status_code == 200
        app.state.heard -= 6
        answer = await http.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the engine has not answered for 6 s"
        assert (await http.get("/health")).status_code == 200
        app.state.hear()
        assert (await http.get("/ready")).status_code == 200


async def test_a_key_past_its_rate_is_told_when_to_come_back() -> None:
    app = gate(auth={"api_keys": ["one", {"key": "two", "requests_per_minute": None}]},
               limits={"requests_per_minute": 1})  # fmt: skip
    async with client(app) as http:
        post = lambda key: http.post("/v1/completions", headers=bearer(key))  # noqa: E731
        assert (await post("one")).status_code == 200
        refused: httpx.Response = await post("one")
        assert refused.status_code == 429
        assert (
            error_of(refused)["message"] == "This key's limit of 1 requests per minute is used up."
        )
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await http.get("/v1/models", headers=bearer("one"))).status_code == 200
        for _ in range(3):
            assert (await post("two")).status_code == 200
