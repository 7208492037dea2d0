"""Token reports: what each stream by itself would have chosen, against `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from steering.method import log_softmax
from tests.reference import load, scores
from tests.server.live import Server

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
"""Of log-probabilities, float32."""

PROMPT = [11, 40, 7, 93, 5, 61, 22, 8, 15, 33]
OTHER = [9, 4, 71]
PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "report": "tokens"}


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_token_report_tells_the_choice_of_each_stream(
    server: Server, models: Path, temperature: int
) -> None:
    body = {"model": "big", "prompt": PROMPT, "max_tokens": 8, "temperature": temperature,
            "seed": 3, "ignore_eos": True, "return_token_ids": True,
            "steering": {**PROXY, "prompts": {"plain": {"token_ids": OTHER}}}}  # fmt: skip
    answer = server.post("/v1/completions", body).json()
    ids = answer["choices"][0]["token_ids"]
    (choice,) = answer["steering"]["choices"]
    reads = {"base": PROMPT, "chat": PROMPT, "plain": OTHER}
    for i, entry in enumerate(choice["token_details"]):
        assert entry["stream_choices"].keys() == reads.keys()
        for stream, prompt in reads.items():
            want = log_softmax(scores(load(models / stream), [*prompt, *ids[:i]])[-1])
            told = entry["stream_choices"][stream]
            assert told["token_id"] == want.argmax()
            assert told["logprob"] == pytest.approx(want.max(), abs=TOLERANCE)
        assert entry["stream_choices"]["base"]["token_id"] == entry["base_choice_id"]


def test_streams_that_a_request_does_not_use_are_not_told(server: Server) -> None:
    body = {"model": "big", "prompt": PROMPT, "max_tokens": 3, "temperature": 0,
            "steering": {"method": "mix", "weights": {"chat": 1}, "report": "tokens"}}  # fmt: skip
    (choice,) = server.post("/v1/completions", body).json()["steering"]["choices"]
    for entry in choice["token_details"]:
        assert entry["stream_choices"].keys() == {"base", "chat"}
