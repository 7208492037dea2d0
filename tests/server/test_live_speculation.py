"""Speculation over HTTP: the report and `/metrics` count drafts, and what is refused says so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import Server, document
from tests.server.reading import Stream, last_line

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BODY: dict[str, Any] = {
    "model": "big",
    "prompt": "The old mill beside the bridge",
    "max_tokens": 21,
    "temperature": 0,
    "ignore_eos": True,
}
SAME = {"method": "mix", "weights": {"base": 0.0, "chat": 1.0}, "report": "tokens"}
"""The draft stream alone: every draft is accepted."""


@pytest.fixture(scope="module")
def drafting(models: Path) -> Iterator[Server]:
    """A server where `chat` drafts four tokens a step."""
    found = Server(models, document(steering={"speculation": {"draft": "chat", "tokens": 4}}))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


def counted(server: Server, what: str) -> float:
    """One of vLLM's series, summed."""
    start = f"vllm:spec_decode_num_{what}_tokens_total"
    lines = server.get("/metrics").text.splitlines()
    found = [float(line.split()[-1]) for line in lines if line.startswith(start)]
    assert found
    return sum(found)


def test_the_report_and_the_metrics_count_drafts(drafting: Server) -> None:
    before = counted(drafting, "accepted")
    answer = drafting.post("/v1/completions", {**BODY, "steering": SAME}).json()
    report = answer["steering"]
    assert report["tokens"] == answer["usage"]["completion_tokens"] == 21
    # The prompt gives a token, and each of four steps five.
    assert report["speculation"] == {"drafted": 16, "accepted": 16}
    assert report["forward_passes_per_token"]["chat"] > 1
    (choice,) = report["choices"]
    assert len(choice["token_details"]) == 21
    assert counted(drafting, "accepted") == before + 16
    assert counted(drafting, "draft") >= counted(drafting, "accepted")
    found = drafting.get("/metrics").text
    assert 'coxswain_drafted_tokens_total{method="mix"} 16.0' in found
    assert 'coxswain_accepted_tokens_total{method="mix"} 16.0' in found


def test_streamed_replies_have_the_same_report(drafting: Server) -> None:
    whole = drafting.post("/v1/completions", {**BODY, "steering": SAME}).json()
    body = {**BODY, "steering": SAME, "stream": True}
    lines = drafting.post("/v1/completions", body).text
    assert '"drafted":16' in lines.replace(" ", "")
    assert f'"mean_kl":{whole["steering"]["mean_kl"]}'[:14] in lines.replace(" ", "")


def test_the_base_has_no_drafts(drafting: Server) -> None:
    before = counted(drafting, "draft")
    answer = drafting.post("/v1/completions", {**BODY, "steering": {"report": True}}).json()
    assert "speculation" not in answer["steering"]
    assert counted(drafting, "draft") == before


def test_top_n_sigma_is_refused_with_the_others(drafting: Server) -> None:
    answer = drafting.post("/v1/completions", {**BODY, "top_n_sigma": 1.0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "top_n_sigma"
    assert "not possible with speculation" in answer.json()["error"]["message"]


@pytest.mark.parametrize("more", [{"temperature": 1, "min_p": 0.1}, {"logit_bias": {"9": 5}}])
def test_what_cannot_be_speculated_is_refused(drafting: Server, more: dict[str, Any]) -> None:
    answer = drafting.post("/v1/completions", {**BODY, **more})
    assert answer.status_code == 400
    assert "min_p and logit_bias" in answer.json()["error"]["message"]


def test_a_killed_engine_is_told_and_ends_the_server(drafting: Server) -> None:
    """The last test of this file. What a supervisor then makes of it is in `tests/faults`."""
    stream = Stream(drafting, {**BODY, "stream": True, "max_tokens": 220})
    stream.start()
    assert stream.begun.wait(60)
    os.kill(drafting.engine_process(), signal.SIGKILL)
    stream.join(60)
    assert "data: [DONE]" not in stream.lines
    last = json.loads([line for line in stream.lines if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "dead", last
    assert drafting.process.wait(60) == 1
    assert last_line(drafting).startswith("coxswain: engine failure")
    assert "SIGKILL" in last_line(drafting)
