"""How requests end: what log, metrics, trace and client are told, and whose fault it is."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.buggy import ERRORS, POINTS, SAYS
from tests.server.api.asking import BAD, PROXY
from tests.server.live import Server
from tests.server.operation.collector import Collector, attributes
from tests.server.operation.test_live_telemetry import value
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

ERROR_STATUS = 2
"""`STATUS_CODE_ERROR` of OTLP."""

MESSAGES = [{"role": "user", "content": "hello there"}]
APIS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/completions": {"prompt": "hello there", "max_tokens": 8},
    "/v1/responses": {"input": "hello there", "max_output_tokens": 8},
}
QUIET = ("never retrieved", "asyncgen", "was destroyed", "never awaited", "already running")


def asked(path: str, **more: Any) -> dict[str, Any]:
    return {"model": "big-chat", "temperature": 0, **APIS[path], **more}


def sent(server: Server, path: str, identifier: str, **more: Any) -> httpx.Response:
    return server.post(path, asked(path, **more), headers={"x-request-id": identifier})


def datas(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; comments and `[DONE]` are none."""
    told = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in told]


def lines(server: Server, identifier: str = "") -> list[dict[str, Any]]:
    """The log's objects; of one request, if it is named."""
    told = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    found = map(json.loads, told)
    return [one for one in found if identifier in ("", one.get("request_id"))]


def request_line(server: Server, identifier: str) -> dict[str, Any]:
    found: dict[str, Any] = until(
        lambda: next((x for x in lines(server, identifier) if x["message"] == "request"), None)
    )
    return found


@pytest.mark.parametrize("path", APIS)
def test_a_stream_that_breaks_after_its_first_byte_is_an_error_everywhere(
    fresh: Server, collector: Collector, path: str
) -> None:
    identifier = "broke-" + path.rsplit("/", 1)[1]
    counts = {s: value(fresh, "coxswain_requests_total", status=s) for s in ("200", "500")}
    answer = sent(fresh, path, identifier, stream=True, logit_bias={str(BAD): 100})
    assert answer.status_code == 200, answer.text
    events = datas(answer)
    assert len(events) > 1, "nothing was sent before it broke"
    error = events[-1]
    if path == "/v1/responses":
        assert (error["type"], error["sequence_number"]) == ("error", len(events) - 1)
    else:
        error = error["error"]
        assert error["type"] == "server_error"
    assert "The stream 'plain' gives scores that are NaN or infinite" in error["message"]
    assert error["code"] == "internal_error"
    line = request_line(fresh, identifier)
    assert (line["status"], line["sent_status"], line["failure"]) == (500, 200, "internal_error")
    assert value(fresh, "coxswain_requests_total", status="500") == counts["500"] + 1
    assert value(fresh, "coxswain_requests_total", status="200") == counts["200"]
    (span, *_) = until(lambda: collector.find(identifier), 30)
    assert span.status.code == ERROR_STATUS and "NaN" in span.status.message
    assert attributes(span)["http.response.status_code"] == 200
    assert attributes(span)["error.type"] == "internal_error"


BUGS = [
    (point, path, stream, ERRORS[number % len(ERRORS)].__name__)
    for number, (point, path, stream) in enumerate(
        (point, path, stream)
        for point in POINTS
        for path in APIS
        for stream in (False, True)
        if stream or point != "sse"
    )
] + [("building", path, True, error.__name__) for path in APIS for error in ERRORS]


@pytest.mark.parametrize(("point", "path", "stream", "error"), sorted(set(BUGS)))
def test_a_bug_of_ours_is_500_with_a_traceback_in_the_log(
    fresh: Server, point: str, path: str, stream: bool, error: str
) -> None:
    identifier = f"bug:{point}:{error}:{path.rsplit('/', 1)[1]}-{stream}"
    answer = sent(fresh, path, identifier, stream=stream, steering={"report": True})
    told = answer.text
    if answer.status_code == 200:
        assert stream
        last = datas(answer)[-1]
        assert (last if path == "/v1/responses" else last["error"])["code"] == "internal_error"
    else:
        assert answer.status_code == 500, told
        assert answer.json()["error"]["type"] == "server_error"
    assert SAYS not in told
    assert request_line(fresh, identifier)["status"] == 500
    logged = [one.get("exception", "") for one in lines(fresh, identifier)]
    assert any(f"{error}: " in one and SAYS in one for one in logged), logged


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", APIS)
def test_the_same_request_without_a_bug_is_answered(fresh: Server, path: str, stream: bool) -> None:
    identifier = f"fine-{path.rsplit('/', 1)[1]}-{stream}"
    answer = sent(fresh, path, identifier, stream=stream, steering={"report": True})
    assert answer.status_code == 200, answer.text
    assert '"steering"' in answer.text
    assert request_line(fresh, identifier)["status"] == 200


@pytest.mark.parametrize("path", APIS)
def test_a_client_that_leaves_at_any_moment_leaves_nothing(fresh: Server, path: str) -> None:
    before = len(fresh.log.read_text())
    endless = asked(path, stream=True, ignore_eos=True, logit_bias={str(BAD): -100})
    endless[next(f for f in endless if f.startswith("max_"))] = 200
    for read in (0, 1, 200, 3000):
        raw = json.dumps(endless).encode()
        head = (f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                f"content-length: {len(raw)}\r\n\r\n")  # fmt: skip
        with socket.create_connection(("127.0.0.1", fresh.port), timeout=60) as sock:
            sock.sendall(head.encode() + raw)
            got = b""
            while len(got) < read:
                got += sock.recv(4096)
        until(lambda: fresh.get("/ready").json()["in_flight"] == 0, 20)
    until(lambda: value(fresh, "vllm:num_requests_running") == 0, 20)
    new = fresh.log.read_text()[before:]
    assert not [word for word in QUIET if word in new], new
    left = [one["status"] for one in lines(fresh) if one.get("http") == f"POST {path}"]
    assert left[-4:] == [499] * 4


def test_responses_gets_as_many_prompt_tokens_as_chat(fresh: Server) -> None:
    chat, responses = (
        fresh.post(path, asked(path)).json()["usage"]
        for path in ("/v1/chat/completions", "/v1/responses")
    )
    assert responses["input_tokens"] == chat["prompt_tokens"]


@pytest.mark.parametrize("field", ["request_id", "model", "user", "input"])
def test_a_field_forges_no_line(fresh: Server, field: str) -> None:
    forged = "x\ncoxswain: request status=200\r\x1b[2K"
    body = asked("/v1/responses", logit_bias={str(BAD): 100})
    fresh.post("/v1/responses", {**body, field: forged})
    fresh.post("/v1/" + quote(forged), {})
    assert "\ncoxswain:" not in fresh.log.read_text()
    (ended, *_) = [one for one in lines(fresh) if one["message"].startswith("Request ")]
    assert ended["logger"] == "steering.worker.scheduler"


def test_a_prompt_s_steering_is_told_apart(fresh: Server) -> None:
    """The base alone reads the token that breaks `plain`: it is the stream, not the request."""
    bias = {str(BAD): 100}
    answer = fresh.post("/v1/completions", {**asked("/v1/completions", logit_bias=bias),
                                               "model": "big"})  # fmt: skip
    assert answer.status_code == 200, answer.text
    steered = fresh.post("/v1/completions", {**asked("/v1/completions", logit_bias=bias),
                                                "model": "big", "steering": PROXY})  # fmt: skip
    assert steered.status_code == 500
