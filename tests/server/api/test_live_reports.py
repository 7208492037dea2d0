"""Reports, over HTTP."""

from __future__ import annotations

import math

import pytest

from tests.server.api.asking import PROXY, complete, events
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_a_report_says_what_steering_did(server: Server) -> None:
    found = complete(server, {"profile": "big-chat", "report": True})["steering"]
    assert found["method"] == "proxy_tuning"
    assert found["profile"] == "big-chat"
    assert found["strengths"] == {"base": 1.0, "chat": 1.0, "plain": -1.0}
    assert found["streams"] == ["chat", "plain"]
    assert found["tokens"] == 8
    assert found["mean_kl"] > 0
    assert 0 < found["share_changed"] <= 1
    assert found["forward_passes_per_token"]["chat"] == pytest.approx(1, abs=0.3)


def test_a_report_of_the_base_says_nothing_changed(server: Server) -> None:
    found = complete(server, {**PROXY, "strength": 0, "report": True})["steering"]
    assert found["streams"] == []
    assert found["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert found["share_changed"] == 0


def test_token_reports_agree_with_logprobs(server: Server) -> None:
    answer = complete(server, {**PROXY, "report": "tokens"}, logprobs=1, return_token_ids=True)
    (choice,) = answer["steering"]["choices"]
    details = choice["token_details"]
    assert [d["token_id"] for d in details] == answer["choices"][0]["token_ids"]
    reported = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert [d["steered_logprob"] for d in details] == pytest.approx(reported, abs=1e-3)
    assert all(math.isfinite(d["base_logprob"]) and d["kl"] >= -1e-6 for d in details)
    assert sum(d["changed"] for d in details) == pytest.approx(choice["share_changed"] * 8)


def test_reports_of_streams_come_in_one_more_chunk(server: Server) -> None:
    body = {"model": "big-chat", "max_tokens": 6, "stream": True, "temperature": 0,
            "ignore_eos": True, "messages": [{"role": "user", "content": "Hi"}],
            "steering": {"report": "tokens"}}  # fmt: skip
    found = events(server, "/v1/chat/completions", body)
    assert found[-1]["choices"] == []
    assert found[-1]["steering"]["tokens"] == 6
    assert len(found[-1]["steering"]["choices"][0]["token_details"]) == 6
    assert found[-1]["id"] == found[0]["id"]
    assert all("steering" not in chunk for chunk in found[:-1])


def test_reports_with_several_choices(server: Server) -> None:
    found = complete(server, {**PROXY, "report": True}, n=3, temperature=1, seed=1)["steering"]
    assert [c["index"] for c in found["choices"]] == [0, 1, 2]
    assert found["tokens"] == 24
