"""Administration, metrics, and clients that leave."""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx
import pytest

from tests.server.api.asking import GREEDY, PROXY, complete
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_profiles_over_the_admin_api(server: Server) -> None:
    url = f"{server.url}/admin/profiles/mine"
    profile = {"method": "mix", "weights": {"base": 1, "chat": 0.5}}
    assert httpx.put(url, json=profile).status_code == 201
    assert httpx.put(url, json=profile).status_code == 200
    assert httpx.get(url).json()["origin"] == "admin"
    assert complete(server, model="mine")["model"] == "mine"
    assert "mine" in [card["id"] for card in server.get("/v1/models").json()["data"]]
    assert httpx.delete(url).status_code == 204
    assert httpx.delete(url).status_code == 404
    assert server.post("/v1/completions", {"model": "mine", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("name", "profile", "status"),
    [
        ("bad", {"method": "mix", "weights": {"nope": 1}}, 404),
        ("bad", {"method": "mix", "weights": {"chat": 99}}, 400),
        ("bad", {"method": "mix", "weights": {"chat": 1}, "limits": {"weight": [-99, 99]}}, 400),
        ("bad", {"weights": {"chat": 1}}, 400),
        ("bad", [], 400),
        ("bad", {"method": "mix", "weights": {"chat": 1}, "chat_template": "{% for"}, 400),
        ("big", {"method": "mix", "weights": {"chat": 1}}, 409),
        ("big-chat", {"method": "mix", "weights": {"chat": 1}}, 409),
        ("not ok", {"method": "mix", "weights": {"chat": 1}}, 400),
    ],
)
def test_bad_profiles_are_refused(server: Server, name: str, profile: Any, status: int) -> None:
    answer = httpx.put(f"{server.url}/admin/profiles/{name}", json=profile)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_status_streams_and_methods(server: Server) -> None:
    status = server.get("/admin/status").json()
    assert status["status"] == "ready"
    assert status["streams"] == ["chat", "plain", "twin"]
    assert status["max_model_len"] == 224, "the flag wins over the file"
    streams = {s["name"]: s for s in server.get("/admin/streams").json()["streams"]}
    assert streams["chat"]["architecture"] == "Qwen2ForCausalLM"
    assert streams["base"]["passes"] > 0
    methods = {m["name"]: m for m in server.get("/admin/methods").json()["methods"]}
    assert "strength" in methods["proxy_tuning"]["options"]["properties"]


def test_metrics_have_vllm_s_series_and_ours(server: Server) -> None:
    complete(server, "big-chat")
    found = server.get("/metrics").text
    assert "vllm:num_requests_running" in found
    who = 'method="proxy_tuning",profile="big-chat",adapter="none"'
    who = ",".join(sorted(who.split(",")))
    assert f'coxswain_requests_total{{{who},status="200"}}' in found
    assert 'coxswain_stream_tokens_total{stream="chat"}' in found
    assert 'coxswain_stream_passes_total{stream="base"}' in found
    assert "coxswain_request_seconds_bucket" in found
    assert "nope" not in found


def test_a_client_that_leaves_frees_its_request(server: Server) -> None:
    body = {"model": "big", **GREEDY, "max_tokens": 200, "stream": True,
            "steering": {**PROXY, "report": True}}  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        running = next(
            line for line in server.get("/metrics").text.splitlines()
            if line.startswith("vllm:num_requests_running{")
        )  # fmt: skip
        if float(running.rsplit(" ", 1)[1]) == 0 and server.get("/ready").json()["in_flight"] == 0:
            break
    else:
        pytest.fail("the request is still running")
    assert 'status="499"' in server.get("/metrics").text


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault(server: Server) -> None:
    def left() -> float:
        lines = server.get("/metrics").text.splitlines()
        ours = [line for line in lines if line.startswith("coxswain_requests_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in ours if 'status="499"' in line)

    before, log = left(), server.log.read_text()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
        line.sendall(f'{head}Content-Length: 900\r\n\r\n{{"model": '.encode())
        time.sleep(0.2)
    until(lambda: left() > before)
    assert "Traceback" not in server.log.read_text()[len(log) :]
