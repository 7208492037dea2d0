"""A real server under stress: limits, rates, a full queue, slow clients, a stuck engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.redis_server import RedisServer
from tests.server.live import Server
from tests.server.operation.conftest import KEYS
from tests.server.operation.test_live_telemetry import BODY, STEERED, complete, value
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def keyed(name: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {KEYS[name]}"}}


def told(answer: httpx.Response) -> dict[str, str]:
    """The headers with a key's limits."""
    start = "x-ratelimit-"
    return {k.removeprefix(start): v for k, v in answer.headers.items() if k.startswith(start)}


class Stream(threading.Thread):
    """Reads one stream in the background; `first` is set by its first line."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__()
        self.server, self.body = server, body
        self.lines: list[str] = []
        self.first = threading.Event()

    def run(self) -> None:
        url = f"{self.server.url}/v1/completions"
        with httpx.stream("POST", url, json=self.body, timeout=60, **keyed("free")) as answer:
            for line in answer.iter_lines():
                self.lines += [line] if line else []
                self.first.set()


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"prompt": list(range(10, 111))}, "prompt", "(got 101); allowed: at most 100"),
        ({"max_tokens": 151}, "max_tokens", "(got 151); allowed: at most 150"),
        ({"prompt": ["a"] * 3, "n": 3}, "n", "(got 9); allowed: at most 8"),
    ],
)
@pytest.mark.parametrize("model", ["big", "big-chat"])
def test_what_one_request_may_not_take_is_refused(
    operated: Server, model: str, more: dict[str, Any], param: str, words: str
) -> None:
    answer = operated.post("/v1/completions", {**BODY, "model": model, **more})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_chat_names_its_own_field_of_the_reply_s_length(operated: Server) -> None:
    body = {"model": "big-chat", "messages": [{"role": "user", "content": "Hi"}]}
    answer = operated.post("/v1/chat/completions", {**body, "max_completion_tokens": 151})
    assert answer.json()["error"]["param"] == "max_completion_tokens"


def test_a_request_that_names_no_length_gets_the_longest(operated: Server) -> None:
    body = {"model": "big-chat", "messages": [{"role": "user", "content": "Hi"}],
            "ignore_eos": True}  # fmt: skip
    answer = operated.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 150


def test_a_key_s_requests_per_minute(operated: Server, redis: RedisServer) -> None:
    refused = value(operated, "coxswain_refusals_total", reason="requests_per_minute")
    for left in (2, 1, 0):
        answer = operated.post("/v1/completions", {**BODY, "stream": left == 1}, **keyed("slow"))
        assert answer.status_code == 200, answer.text
        assert told(answer)["limit-requests"] == "3"
        assert told(answer)["remaining-requests"] == str(left)
    answer = operated.post("/v1/completions", BODY, **keyed("slow"))
    assert answer.status_code == 429
    assert told(answer).items() >= {"limit-requests": "3", "remaining-requests": "0"}.items()
    assert re.fullmatch("1m0s|[0-9]+s", told(answer)["reset-requests"])
    assert told(operated.get("/v1/models", **keyed("slow"))).keys() == told(answer).keys()
    assert told(operated.post("/v1/completions", BODY)) == {}
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert value(operated, "coxswain_refusals_total", reason="requests_per_minute") == refused + 1
    complete(operated)
    with Redis(unix_socket_path=str(redis.socket)) as client:
        (key,) = client.keys("{operation:rates:*}:requests")
        assert client.get(key) == b"3"
        # What another replica counts is this key's too, and so is its end.
        client.delete(key)
    complete(operated, **keyed("slow"))


def test_a_key_s_tokens_per_minute(operated: Server) -> None:
    complete(operated, {**BODY, "max_tokens": 40}, **keyed("small"))
    refused = until(
        lambda: a if (a := operated.post("/v1/completions", BODY, **keyed("small"))).is_error
        else None
    )  # fmt: skip
    assert refused.status_code == 429
    assert "limit of 40 tokens per minute" in refused.json()["error"]["message"]
    assert told(refused)["limit-tokens"] == "40"
    assert told(refused)["remaining-tokens"] == "0"


def test_keys_that_are_wrong_are_counted(operated: Server) -> None:
    before = value(operated, "coxswain_refusals_total", reason="unauthenticated")
    headers = {"authorization": "Bearer wrong"}
    assert operated.post("/v1/completions", BODY, headers=headers).status_code == 401
    assert operated.get("/admin/status", **keyed("free")).status_code == 403
    assert value(operated, "coxswain_refusals_total", reason="unauthenticated") == before + 1
    assert value(operated, "coxswain_refusals_total", reason="forbidden") > 0


def test_a_body_that_drips_is_cut_off(operated: Server) -> None:
    with socket.create_connection(("127.0.0.1", operated.port), timeout=20) as sock:
        head = (f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS['free']}"
                "\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{")  # fmt: skip
        began = time.monotonic()
        sock.sendall(head.encode())
        answer = b""
        while part := sock.recv(4096):  # until the server closes the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    assert 1.5 < time.monotonic() - began < 15


def test_a_client_that_leaves_frees_its_request_at_once(operated: Server) -> None:
    body = {**STEERED, "max_tokens": 150, "n": 8, "temperature": 1}
    before = value(operated, "coxswain_requests_total", status="499")
    url = f"{operated.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, **keyed("free")) as stream:
        next(stream.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=0.15, **keyed("free"))
    until(lambda: value(operated, "vllm:num_requests_running") == 0, 5)
    until(lambda: operated.get("/ready").json()["in_flight"] == 0, 5)
    assert value(operated, "coxswain_requests_total", status="499") == before + 2


def test_a_stuck_engine_fills_the_queue_ends_requests_and_is_not_ready_until_it_goes_on(
    operated: Server,
) -> None:
    right = complete(operated, STEERED).json()["choices"]
    late = value(operated, "coxswain_requests_total", status="504")
    engine = operated.engine_process()
    with ThreadPoolExecutor(8) as pool:
        long = {"max_tokens": 150, "n": 8, "temperature": 1.0, "stream": True}
        begun = Stream(operated, {**STEERED, **long})
        begun.start()
        assert begun.first.wait(30)
        os.kill(engine, signal.SIGSTOP)
        try:
            asked = [
                pool.submit(operated.post, "/v1/completions", {**STEERED, "stream": i % 2 == 0})
                for i in range(5)
            ]
            until(lambda: operated.get("/ready").json()["in_flight"] == 6, 6)
            full = operated.post("/v1/completions", BODY)
            assert full.status_code == 429
            assert full.headers["retry-after"] == "1"
            answer = until(lambda: a if (a := operated.get("/ready")).is_error else None, 6)
            assert answer.status_code == 503
            assert "the engine has not answered for" in answer.json()["reason"]
            assert operated.get("/health").status_code == 200
            answers = [one.result(60) for one in asked]
            begun.join(60)
        finally:
            os.kill(engine, signal.SIGCONT)
    for answer in answers:
        assert answer.status_code == 504, answer.text
        assert "limits.request_timeout_s (7 s)" in answer.json()["error"]["message"]
    assert json.loads(begun.lines[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert value(operated, "coxswain_requests_total", status="504") == late + 6
    told = [json.loads(line) for line in operated.log.read_text().splitlines()]
    (broken,) = [one for one in told if one.get("failure") == "request_timeout"]
    assert (broken["status"], broken["sent_status"]) == (504, 200)
    until(lambda: operated.get("/ready").status_code == 200, 30)
    assert operated.get("/ready").json()["in_flight"] == 0
    until(lambda: value(operated, "vllm:num_requests_running") == 0, 10)
    assert complete(operated, STEERED).json()["choices"] == right
    assert value(operated, "coxswain_refusals_total", reason="queue_full") >= 1


def test_an_idle_connection_is_kept_for_its_time(operated: Server) -> None:
    with socket.create_connection(("127.0.0.1", operated.port), timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        while sock.recv(65536):
            pass
        # The default would be over a minute.
        assert 0.5 < time.monotonic() - begun < 30
