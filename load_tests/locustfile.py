"""A soak: hours of mixed requests against a running server with the demo zoo.

    make serve
    locust -f load_tests/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 2 -t 8h

Steering of every kind, adapters, a pack, profiles, streams, clients that leave in the middle, and
bad bodies, which must be refused with the status that they deserve. A greedy question asked again
and again must always get the answer that it got first. Every `SAMPLE_S` seconds the server's memory
and queue are printed, and after the last request nothing may be left running: the exit status is 1
if that or any request failed.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import requests
from locust import HttpUser, between, events, task
from locust.env import Environment

SAMPLE_S = 60.0
DRAIN_S = 60.0
"""How long requests that clients have left may still run."""

QUESTIONS = (
    "What is the pet of Dorwyn Bramley?",
    "What does Roven Holcroft work as?",
    "Who are you?",
    "Where is Glen Balstad?",
)
TUNING = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
STEERINGS: tuple[dict[str, Any], ...] = (
    {**TUNING, "strength": 0.8},
    {**TUNING, "strength": 1.5, "report": True},
    {"method": "emulated_fine_tuning", "tuned": "chat", "reference": "plain", "delta_top_p": 0.95},
    {"method": "contrastive", "amateur": "plain", "strength": 0.5, "plausibility": 0.1},
    {"method": "mix", "weights": {"base": 1.0, "formal": 0.5, "plain": -0.5}, "report": "tokens"},
    {"method": "context_aware", "without": "twin", "prompts": {"twin": {"prompt": "Answer:"}}},
    {"method": "guidance", "negative": "twin", "prompts": {"twin": {"prompt": "Answer:"}}},
    {"method": "value_augmented", "values": [{"stream": "terse", "strength": 2.0}]},
    {"method": "critical_tokens", "pretrained": "twin", "classifier": "critic"},
    {"method": "best_of_n", "n": 4, "value": "terse"},
)
ADAPTED: tuple[dict[str, Any], ...] = (
    {"model": "swap"},
    {"model": "brief"},
    {"adapters": [{"name": "brief", "weight": 0.8}, {"name": "swap", "weight": 0.2}]},
    {"adapters": [{"name": "pack", "top_k": 2}]},
    {"adapters": [{"name": "pack", "top_k": 1}], "steering": {**TUNING, "report": True}},
)
BAD: tuple[tuple[int, dict[str, Any]], ...] = (
    (400, {"steering": {"method": "proxy_tuning", "expert": "chat"}}),
    (400, {"steering": {**TUNING, "strength": -1}}),
    (400, {"steering": {**TUNING, "strength": 1e9}}),
    (400, {"steering": {"method": "no-such-method"}}),
    (400, {"steering": {"method": "mix", "weights": {"nobody": 1.0}}}),
    (400, {"max_tokens": -5}),
    (400, {"messages": "no list"}),
    (400, {"temperature": "hot"}),
    (404, {"model": "no-such-model"}),
    (404, {"adapters": [{"name": "no-such-adapter"}]}),
)
"""(status, fields) of bodies that must be refused."""


class Tenant(HttpUser):
    """Somebody who mixes everything."""

    wait_time = between(0.05, 1.0)
    first_answer: str | None = None
    """To the question that is asked again and again, over all users."""

    def _body(self, **fields: Any) -> dict[str, Any]:
        return {
            "model": "base",
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": random.randint(4, 48),
            "temperature": random.choice((0.0, 0.7, 1.0)),
            **fields,
        }

    def _chat(self, name: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        """The reply of one request that is not streamed; another status than `status` fails."""
        path = "/v1/chat/completions"
        with self.client.post(path, json=body, name=name, catch_response=True) as answer:
            if answer.status_code != status:
                answer.failure(f"{answer.status_code}, not {status}: {answer.text[:300]}")
                return {}
            found: dict[str, Any] = answer.json()
            if ("error" in found) != (status != 200):
                answer.failure(f"an error with status {status}: {found}")
                return {}
            answer.success()
        return found

    def _stream(self, name: str, body: dict[str, Any], leave_after: int | None = None) -> None:
        """Reads a stream to its end, or leaves after so many events."""
        path = "/v1/chat/completions"
        body = {**body, "stream": True}
        begin, count, last = time.perf_counter(), 0, ""
        with self.client.post(
            path, json=body, name=name, stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text[:300]}")
                return
            for last in _events(answer):
                count += 1
                if count == 1:
                    self._report("first event", name, begin)
                if '"error"' in last:
                    answer.failure(f"an error in the stream: {last[:300]}")
                    return
                if count == leave_after:
                    answer.close()
                    answer.success()
                    return
            if last != "[DONE]":
                answer.failure(f"the stream ended with {last[:100]!r} after {count} events")
                return
            answer.success()
        self._report("whole stream", name, begin)

    def _report(self, kind: str, name: str, begin: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1e3 * (time.perf_counter() - begin),
            response_length=0,
            exception=None,
            context={},
        )

    @task(4)
    def steered(self) -> None:
        """A reply with steering, whole."""
        self._chat("steered", self._body(steering=random.choice(STEERINGS)))

    @task(6)
    def steered_stream(self) -> None:
        """The same as a stream."""
        self._stream("steered stream", self._body(steering=random.choice(STEERINGS)))

    @task(4)
    def adapted(self) -> None:
        """Adapters, their mixtures and the pack."""
        self._stream("adapted stream", self._body(**random.choice(ADAPTED)))

    @task(3)
    def plain(self) -> None:
        """The base, with several choices and log-probabilities."""
        more = {"n": 2, "logprobs": True, "top_logprobs": 3, "temperature": 0.9}
        self._chat("base", self._body(**more))

    @task(2)
    def leaves(self) -> None:
        """A client that goes in the middle of a long reply."""
        body = self._body(max_tokens=200, steering=random.choice(STEERINGS[:8]))
        self._stream("left stream", body, leave_after=random.randint(1, 8))

    @task(2)
    def bad(self) -> None:
        """A body that must be refused, and how."""
        status, fields = random.choice(BAD)
        self._chat(f"refused with {status}", self._body(**fields), status)

    @task(1)
    def broken(self) -> None:
        """No JSON at all."""
        with self.client.post(
            "/v1/chat/completions",
            data='{"model": "base", "messages": [',
            headers={"Content-Type": "application/json"},
            name="broken JSON",
            catch_response=True,
        ) as answer:
            if answer.status_code == 400:
                answer.success()
            else:
                answer.failure(f"{answer.status_code}, not 400")

    @task(2)
    def same(self) -> None:
        """The greedy answer that must not change, whatever else runs."""
        body = {
            "model": "chat",
            "messages": [{"role": "user", "content": QUESTIONS[0]}],
            "max_tokens": 32,
            "temperature": 0,
        }
        found = self._chat("the same question", body)
        if not found:
            return
        answer = found["choices"][0]["message"]["content"]
        if Tenant.first_answer is None:
            Tenant.first_answer = answer
        if answer != Tenant.first_answer:
            raise AssertionError(f"was {Tenant.first_answer!r}, is {answer!r}")


def _events(answer: Any) -> Iterator[str]:
    for line in answer.iter_lines():
        text = line.decode()
        if text.startswith("data: "):
            yield text.removeprefix("data: ")


# --- the server ---------------------------------------------------------------------------------


def gauges(host: str) -> dict[str, float]:
    """Requests that run and wait, and the bytes of the server's resident memory."""
    wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "process_resident_memory")
    found: dict[str, float] = {}
    for line in requests.get(f"{host}/metrics", timeout=30).text.splitlines():
        for name in wanted:
            if line.startswith((f"{name}{{", f"{name}_bytes ")):
                found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def watch(environment: Environment, **_: Any) -> None:
    """Prints the gauges while the soak runs."""

    def sample() -> None:
        while True:
            print(json.dumps({"time": time.strftime("%H:%M:%S"), **gauges(environment.host or "")}))
            time.sleep(float(os.environ.get("SOAK_SAMPLE_S", SAMPLE_S)))

    threading.Thread(target=sample, daemon=True).start()  # a greenlet, as Locust patches it


def drained(environment: Environment, **_: Any) -> None:
    """Fails unless the server has become idle."""
    deadline = time.monotonic() + DRAIN_S
    while any(v for k, v in gauges(environment.host or "").items() if "num_requests" in k):
        if time.monotonic() > deadline:
            print(f"requests still run {DRAIN_S:g} s after the last client left")
            environment.process_exit_code = 1
            return
        time.sleep(0.5)
    print("the server is idle")


events.test_start.add_listener(watch)  # type: ignore[no-untyped-call]
events.quitting.add_listener(drained)  # type: ignore[no-untyped-call]
