"""The gate: phases, body limits, probes, limits of callers; without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.context import context_of
from server.errors import HttpError, from_vllm
from server.routes.body import strict_json
from tests.server.operation.gates import (
    BODY_LIMIT,
    bearer,
    client,
    echo,
    error_of,
    gate,
    request_scope,
)


async def test_before_the_engine_is_up_only_probes_answer() -> None:
    app = gate()
    app.inner, app.state.phase, app.state.reason = None, "starting", "loading models: big"
    async with client(app) as http:
        assert (await http.get("/health")).status_code == 200
        ready = await http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["reason"] == "loading models: big"
        for path in ("/v1/models", "/admin/status", "/nowhere"):
            answer = await http.get(path)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "loading models" in error_of(answer)["message"]


async def test_draining_refuses_new_inference_but_answers_administration() -> None:
    app = gate()
    app.state.phase, app.state.reason = "draining", "asked to end"
    async with client(app) as http:
        answer = await http.post("/v1/completions", content=b"{}")
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "draining"
        assert "retry-after" in answer.headers
        assert (await http.get("/admin/status")).status_code == 200
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503


async def test_a_dead_engine_shows_in_both_probes() -> None:
    app = gate()
    app.state.phase, app.state.reason = "dead", "the engine process ended"
    async with client(app) as http:
        assert (await http.get("/health")).status_code == 503
        ready = await http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["reason"] == "the engine process ended"


@pytest.mark.parametrize("size", [BODY_LIMIT + 1, 100 * BODY_LIMIT])
async def test_large_bodies_are_refused_with_or_without_a_length(size: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 500):
            yield b"x" * min(500, size - start)

    async with client(gate()) as http:
        for content in (b"x" * size, chunks()):
            answer = await http.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert error_of(answer)["code"] == "body_too_large"


async def test_a_body_at_the_limit_passes() -> None:
    async with client(gate()) as http:
        answer = await http.post("/v1/completions", content=b"x" * BODY_LIMIT)
        assert answer.json() == {"length": BODY_LIMIT}


async def test_one_request_more_than_the_limit_is_told_to_come_back() -> None:
    app = gate(server={"max_in_flight": 1})
    running, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        running.set()
        await go_on.wait()
        await echo(scope, receive, send)

    app.inner = slow
    async with client(app) as http:
        first = asyncio.create_task(http.post("/v1/completions"))
        await running.wait()
        refused = await http.post("/v1/completions")
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) > 0
        assert (await http.get("/health")).status_code == 200
        go_on.set()
        assert (await first).status_code == 200
        assert (await http.post("/v1/completions")).status_code == 200


def told(answer: httpx.Response) -> dict[str, str]:
    """The headers with a caller's limits."""
    start = "x-ratelimit-"
    return {k.removeprefix(start): v for k, v in answer.headers.items() if k.startswith(start)}


async def test_every_answer_of_a_caller_with_limits_tells_what_is_left() -> None:
    app = gate(auth={"api_keys": ["free", {"key": "two", "requests_per_minute": 2}],
                     "admin_key": "admin"})  # fmt: skip
    fresh = {"limit-requests": "2", "remaining-requests": "2", "reset-requests": "0s"}
    async with client(app) as http:
        for key, path in (("free", "/v1/models"), ("two", "/metrics"), ("admin", "/admin/status"),
                          ("wrong", "/v1/models"), ("two", "/health")):  # fmt: skip
            assert told(await http.get(path, headers=bearer(key))) == {}
        assert told(await http.get("/v1/models", headers=bearer("two"))) == fresh
        large = await http.post("/v1/x", headers=bearer("two"), content=b"x" * (BODY_LIMIT + 1))
        assert (large.status_code, told(large)) == (413, fresh)
        for left in ("1", "0"):
            answer = await http.post("/v1/completions", headers=bearer("two"))
            now = {**fresh, "remaining-requests": left, "reset-requests": "1m0s"}
            assert (answer.status_code, told(answer)) == (200, now)
        refused = await http.post("/v1/completions", headers=bearer("two"))
        assert (refused.status_code, told(refused)) == (429, now)
        assert refused.headers["retry-after"] == "60"
        app.server = app.server.model_copy(update={"max_in_flight": 1})
        app.state.enter()
        full = await http.post("/v1/completions", headers=bearer("two"))
        assert full.status_code == 429 and "limit of 1 requests" in error_of(full)["message"]
        assert told(full) == now


async def test_without_keys_the_limits_of_all_clients_together_are_told() -> None:
    async with client(gate(limits={"tokens_per_minute": 7})) as http:
        found = told(await http.get("/v1/models"))
    assert found == {"limit-tokens": "7", "remaining-tokens": "7", "reset-tokens": "0s"}


async def test_a_request_that_is_cut_off_before_its_answer_is_told() -> None:
    app = gate()

    async def endless(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.Event().wait()

    app.inner = endless
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = request_scope()
    task = asyncio.create_task(app(scope, AsyncMock(), send))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "draining"
    assert app.state.in_flight == 0


async def test_a_bug_in_the_middle_of_a_stream_ends_it_with_an_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise RuntimeError("a bug")

    app, sent = gate(), AsyncMock()
    app.inner = breaks
    scope = request_scope()
    await app(scope, AsyncMock(return_value={"type": "http.request", "body": b""}), sent)
    last = sent.call_args.args[0]
    assert not last.get("more_body")
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert context_of(scope).status == 500
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_requests_in_flight_are_counted_and_a_crash_is_contained() -> None:
    app = gate()
    seen = []

    async def crash(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(app.state.in_flight)
        await PlainTextResponse("broken", 500)(scope, receive, send)
        raise RuntimeError("a bug")

    app.inner = crash
    async with client(app) as http:
        assert (await http.post("/v1/completions")).status_code == 500
    assert seen == [1]
    assert app.state.in_flight == 0
    assert app.state.idle.is_set()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"steering": {"strength": NaN}}',
        b'{"steering": {"weights": {"chat": 1e999}}}',
        b'{"a": [1, -Infinity]}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ',
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_what_json_does_not_have_is_refused(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        strict_json(raw)
    assert caught.value.status == 400


def test_good_json_passes() -> None:
    assert strict_json(b'{"a": [1.5, "\\u00e9\\ud83d\\ude00", 1e99]}') == {"a": [1.5, "é😀", 1e99]}


def test_vllm_errors_get_our_shape() -> None:
    found = from_vllm({"message": "no", "type": "NotFoundError", "param": "model", "code": 404})
    assert (found.status, found.code) == (404, "model_not_found")
    assert from_vllm({"message": "x", "param": "body.top_p", "code": 400}).param == "top_p"
    appended = "top_p must be in (0, 1], got 3.0. (parameter=top_p, value=3.0)"
    found = from_vllm({"message": appended, "param": "top_p", "code": 400})
    assert (found.param, found.message) == ("top_p", "top_p must be in (0, 1], got 3.0.")
    unnamed = from_vllm({"message": "n must be at least 1, got 0.", "param": None, "code": 400})
    assert unnamed.param == "n"
    assert from_vllm({"message": "Failed to transform", "param": None, "code": 400}).param is None


async def test_ping_says_what_ready_says() -> None:
    app = gate(auth={"api_keys": ["k"]})
    for phase, status in (("starting", 503), ("ready", 200), ("draining", 503)):
        app.state.phase = phase  # type: ignore[assignment]
        async with client(app) as web:
            for answer in (
                await web.get("/ping"),
                await web.post("/ping"),
                await web.get("/ready"),
            ):
                assert answer.status_code == status, phase
            assert (await web.post("/ready")).status_code == 405
