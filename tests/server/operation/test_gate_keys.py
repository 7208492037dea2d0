"""The gate: which key opens which path; without an engine."""

from __future__ import annotations

import json

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.access import Access
from server.context import context_of
from server.errors import HttpError, event
from server.operation.local import is_loopback
from server.paths import is_inference, takes_rates
from tests.server.operation.gates import (
    bearer,
    client,
    error_of,
    gate,
    request_scope,
)


async def test_api_keys_guard_inference_and_tokenisation_only() -> None:
    app = gate(auth={"api_keys": ["one", "two"], "admin_key": "boss"})
    async with client(app) as http:
        for path in ("/v1/models", "/tokenize", "/detokenize"):
            answer = await http.get(path)
            assert answer.status_code == 401
            assert error_of(answer)["type"] == "authentication_error"
            assert (await http.get(path, headers=bearer("three"))).status_code == 401
            assert (await http.get(path, headers=bearer("two"))).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert (await http.get(path)).status_code == 200


async def test_the_admin_key_is_another_key() -> None:
    app = gate(auth={"api_keys": ["one"], "admin_key": "boss"}, server={"host": "0.0.0.0"})
    async with client(app) as http:
        assert (await http.get("/admin/status")).status_code == 401
        assert (await http.get("/admin/status", headers=bearer("one"))).status_code == 403
        assert (await http.get("/admin/status", headers=bearer("boss"))).status_code == 200
        assert (await http.get("/v1/models", headers=bearer("boss"))).status_code == 401


async def test_without_an_admin_key_the_admin_api_is_for_loopback() -> None:
    async with client(gate(server={"host": "0.0.0.0"})) as http:
        assert (await http.get("/admin/status")).status_code == 403
    async with client(gate()) as http:
        assert (await http.get("/admin/status")).status_code == 200
        evil = {"origin": "https://evil.example"}
        assert (await http.post("/admin/drain", headers=evil)).status_code == 403
    async with client(gate(), host="rebound.example") as http:
        assert (await http.get("/admin/status")).status_code == 403


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("192.168.0.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback_is_recognised(host: str, local: bool) -> None:
    assert is_loopback(host) is local


async def test_the_application_learns_what_the_key_may_use() -> None:
    seen: list[Access] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(context_of(scope).access)
        await PlainTextResponse("")(scope, receive, send)

    app = gate(auth={"api_keys": ["wide", {"key": "narrow", "profiles": ["p"]}]})
    app.inner = inner
    async with client(app) as http:
        for key in ("narrow", "wide"):
            assert (await http.get("/v1/models", headers=bearer(key))).status_code == 200
    assert seen == [Access(profiles=frozenset({"p"})), Access()]


INFERENCE = ("/v1/completions", "/v1/messages", "/invocations")
TOKENS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")


@pytest.mark.parametrize("path", [*INFERENCE, *TOKENS])
async def test_every_path_of_the_model_has_the_same_rules(path: str) -> None:
    app = gate(auth={"api_keys": ["k"]}, server={"max_in_flight": 1}, limits={
        "requests_per_minute": 1})  # fmt: skip
    key = {"x-api-key": "k"}
    async with client(app) as web:
        assert (await web.post(path)).status_code == 401
        assert (await web.post(path, headers={"x-api-key": "other"})).status_code == 401
        other = {"authorization": "Bearer other", **key}
        assert (await web.post(path, headers=other)).status_code == 401
        assert (await web.post(path, headers=key)).status_code == 200
        answer = await web.post(path, headers=key)
        assert (answer.status_code, "per minute" in answer.text) == (429, True)
        app.state.enter()
        assert "at its limit" in (await web.post(path, headers=key)).text
        app.state.leave()
        app.state.phase = "draining"
        assert (await web.post(path, headers=key)).status_code == 503
    assert app.state.in_flight == 0


@pytest.mark.parametrize("path", ["/tokenizer_info", "/version", "/load", "/v1/models"])
async def test_what_tells_of_the_server_needs_a_key(path: str) -> None:
    async with client(gate(auth={"api_keys": ["k"]})) as web:
        assert (await web.get(path)).status_code == 401
        assert (await web.get(path, headers={"x-api-key": "k"})).status_code == 200


def test_only_what_draws_is_inference() -> None:
    for path in (*INFERENCE, *TOKENS):
        scope = request_scope(path)
        assert is_inference(scope) == (path in INFERENCE)
        assert takes_rates(scope)
        assert not takes_rates({**scope, "method": "GET"})
    for path in ("/v1/load_lora_adapter", "/admin/drain", "/version", "/ping"):
        assert not is_inference(request_scope(path)) and not takes_rates(request_scope(path))


@pytest.mark.parametrize(("headers", "status", "kind"), [
    ({}, 401, "authentication_error"), ({"content-length": "9" * 9}, 413, "request_too_large"),
])  # fmt: skip
async def test_the_gate_refuses_messages_in_anthropic_s_shape(
    headers: dict[str, str], status: int, kind: str
) -> None:
    app = gate(auth={"api_keys": ["k"]} if status == 401 else {})
    async with client(app) as web:
        answer = await web.post("/v1/messages", headers=headers)
    assert answer.status_code == status
    found = answer.json()
    assert found["type"] == "error" and found["error"].keys() == {"type", "message"}
    assert found["error"]["type"] == kind
    lines = event("/v1/messages", HttpError(503, "late")).split("\n")
    assert lines[0] == "event: error"
    assert json.loads(lines[1].removeprefix("data: "))["error"]["type"] == "overloaded_error"
