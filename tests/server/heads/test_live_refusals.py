"""Bad input of the methods with heads: refused by name, and nobody else is disturbed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.heads.asking import (
    BEST,
    CRITICAL,
    DRAW,
    GREEDY,
    PROMPT,
    TOLERANCE,
    TWO,
    VALUE,
    ask,
    ids_of,
)
from tests.server.heads.headed import MOST, Slow
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def values(**term: Any) -> dict[str, Any]:
    return {**VALUE, "values": [{"stream": "value", **term}]}


BAD: list[tuple[Any, int, str, str]] = [
    ({**VALUE, "top_k": 0}, 400, "top_k", "0"),
    ({**VALUE, "top_k": MOST + 1}, 400, "top_k", f"1 to {MOST}"),
    ({**VALUE, "top_k": 501}, 400, "top_k", f"1 to {MOST}"),
    ({**VALUE, "top_k": 2.5}, 400, "top_k", "2.5"),
    ({**VALUE, "eos_value": "none"}, 400, "eos_value", "none"),
    (values(strength="2"), 400, "values.0.strength", "'2'"),
    (values(strength=-1), 400, "values.0.strength", "[0, 10]"),
    (values(strength=10.5), 400, "values.0.strength", "[0, 10]"),
    (values(stream="nobody"), 404, "values.0.stream", "one of: "),
    (values(stream="plain"), 400, "values.0.stream", "one of: kind, value"),
    (values(stream="critic"), 400, "values.0.stream", "one of: kind, value"),
    ({**VALUE, "values": []}, 400, "values", "[]"),
    ({**VALUE, "values": [TWO[0], TWO[0]]}, 400, "values", "twice"),
    ({**VALUE, "values": [{"strength": 1}]}, 400, "values.0.stream", "required"),
    ({**VALUE, "beta": 1}, 400, "beta", "top_k"),
    ({**CRITICAL, "threshold": -0.1}, 400, "threshold", "[0, 1]"),
    ({**CRITICAL, "threshold": 1.5}, 400, "threshold", "[0, 1]"),
    ({**CRITICAL, "threshold": "half"}, 400, "threshold", "half"),
    ({**CRITICAL, "classifier": "value"}, 400, "classifier", "one of: critic, probe"),
    ({**CRITICAL, "classifier": "twin"}, 400, "classifier", "one of: critic, probe"),
    ({**CRITICAL, "classifier": "plain"}, 400, "classifier", "one of: critic, probe"),
    ({**CRITICAL, "classifier": "nobody"}, 404, "classifier", "one of: "),
    ({**CRITICAL, "pretrained": "critic"}, 400, "pretrained", "one of: base, plain, twin"),
    ({**CRITICAL, "pretrained": "base"}, 400, "pretrained", "different"),
    ({**CRITICAL, "mode": "medium"}, 400, "mode", "'hard' or 'soft'"),
    ({"method": "mix", "weights": {"base": 1, "value": 1}}, 400, "weights.value", "value head"),
    ({"method": "mix", "weights": {"base": 1, "critic": 1}}, 400, "weights.critic", "classifier"),
    ({"method": "mix", "weights": {"base": 1, "probe": 1}}, 400, "weights.probe", "classifier"),
    ({**BEST, "n": 0}, 400, "n", f"1 to {MOST}"),
    ({**BEST, "n": MOST + 1}, 400, "n", f"1 to {MOST}"),
    ({**BEST, "n": 2.5}, 400, "n", "2.5"),
    ({**BEST, "n": "3"}, 400, "n", "'3'"),
    ({**BEST, "n": True}, 400, "n", "True"),
    ({**BEST, "value": "plain"}, 400, "value", "one of: critic, kind, probe, value"),
    ({**BEST, "value": "nobody"}, 404, "value", "one of: "),
    ({"method": "best_of_n"}, 400, "value", "required"),
    ({**BEST, "prompts": {"plain": {"prompt": "a"}}}, 400, "prompts.plain", "does not use"),
    ({**BEST, "prompts": {"value": {"token_ids": [9] * 255}}}, 400, "prompts", "at most 254"),
    ({"profile": "kinder", "values": [{"stream": "kind", "strength": 3}]}, 400,
     "values.0.strength", "[0, 2]"),
    ({"profile": "picky", "n": 99}, 400, "n", f"1 to {MOST}"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("steering", "status", "field", "words"), BAD)
def test_bad_steering_names_field_value_and_range(
    server: Server, steering: Any, status: int, field: str, words: str, stream: bool
) -> None:
    body = {**DRAW, "stream": stream, "steering": steering}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == f"steering.{field}"
    assert words in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(server: Server, number: str) -> None:
    steering = f'{{"method": "critical_tokens", "threshold": {number}}}'
    raw = f'{{"model": "big", "prompt": "a", "steering": {steering}}}'
    kind = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=raw, headers=kind)
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 2}, "n", "got 2"),
        ({"temperature": 0}, "temperature", "same reply"),
        ({"echo": True, "logprobs": 1}, "steering", "of the prompt"),
        ({"use_beam_search": True}, "use_beam_search", "not possible"),
    ],
)
def test_what_best_of_n_does_not_go_with(
    server: Server, change: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    answer = server.post("/v1/completions", {**DRAW, "stream": stream, "steering": BEST, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize("change", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}])
@pytest.mark.parametrize("steering", [VALUE, BEST])
def test_log_probabilities_of_the_prompt_are_refused(
    server: Server, steering: dict[str, Any], change: dict[str, Any]
) -> None:
    answer = server.post("/v1/completions", {**DRAW, "steering": steering, **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering"


def test_a_burst_of_good_and_bad_requests_disturbs_no_one(server: Server, slow: Slow) -> None:
    good = [VALUE, {**VALUE, "values": TWO}, CRITICAL, {**CRITICAL, "mode": "soft"}, None]
    alone = [ids_of(ask(server, steering)) for steering in good]
    chosen = {**BEST, "report": True}
    jobs: list[tuple[Any, dict[str, Any]]] = []
    for i, (steering, *_) in enumerate(BAD):
        jobs += [(good[i % 5], GREEDY), (steering, DRAW)]
        if i % 4 == 0:
            jobs.append((chosen, {**DRAW, "ignore_eos": True, "seed": i}))

    def send(job: tuple[Any, dict[str, Any]]) -> httpx.Response:
        steering, body = job
        return server.post(
            "/v1/completions", {**body, "steering": steering, "return_token_ids": True}
        )

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(send, jobs))
    refused = []
    for (steering, body), answer in zip(jobs, answers, strict=True):
        if steering is chosen:
            (choice,) = answer.json()["steering"]["choices"]
            value = slow.head("value", [*PROMPT, *ids_of(answer.json())])
            assert max(choice["values"]) == pytest.approx(value, abs=TOLERANCE)
        elif body is GREEDY:
            assert ids_of(answer.json()) == alone[good.index(steering)]
        else:
            refused.append(answer.status_code)
    assert refused == [status for _, status, *_ in BAD]
    assert [ids_of(ask(server, steering)) for steering in good] == alone
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "name": "f"}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_tools_without_a_parser_are_refused_by_both_apis(
    server: Server, choice: Any, stream: bool
) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    named = choice if isinstance(choice, str) else {"type": "function", "function": {"name": "f"}}
    for path, body in (
        ("/v1/responses", {"input": "hi", "tool_choice": choice,
                           "tools": [{"type": "function", **function}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}],
                                  "tool_choice": named,
                                  "tools": [{"type": "function", "function": function}]}),
    ):  # fmt: skip
        answer = server.post(path, {"model": "picky", "stream": stream, **body})
        assert answer.status_code == 400, answer.text
        assert "chat.tool_call_parser" in answer.json()["error"]["message"]
        assert "--" not in answer.text
