"""best_of_n over HTTP: the same replies as without it, and the right one of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.models import EOS
from tests.server.api.asking import events
from tests.server.heads.asking import (
    BEST,
    DRAW,
    PROMPT,
    TOLERANCE,
    ask,
    ids_of,
)
from tests.server.heads.headed import HEADS, MOST, Slow
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def replies(server: Server, n: int, **more: Any) -> dict[str, Any]:
    """The n replies that the request would get, from vLLM's own `n`."""
    return ask(server, **{**DRAW, "ignore_eos": False, **more, "n": n})


def expect_best(
    answer: Mapping[str, Any], drawn: Mapping[str, Any], slow: Slow, head: str
) -> list[float]:
    """The answer is the one of the replies that the head likes best, unchanged."""
    texts = [ids_of(drawn, i) for i in range(len(drawn["choices"]))]
    values = [slow.head(head, [*PROMPT, *text]) for text in texts]
    best = int(np.argmax(values))
    (choice,) = answer["choices"]
    want = drawn["choices"][best]
    assert choice["token_ids"] == want["token_ids"]
    for key in ("text", "finish_reason", "stop_reason"):
        assert choice[key] == want[key]
    assert choice["index"] == 0
    told, expected = (c["logprobs"]["token_logprobs"] for c in (choice, want))
    assert told == pytest.approx(expected, abs=TOLERANCE)
    assert answer["usage"]["completion_tokens"] == len(texts[best])
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    return values


def expect_report(report: Mapping[str, Any], values: list[float], drawn: Mapping[str, Any]) -> None:
    tokens = [len(ids_of(drawn, i)) for i in range(len(values))]
    told = report["best_of_n"]
    assert told["n"] == len(values) and told["generated_tokens"] == sum(tokens)
    (choice,) = report["choices"]
    assert choice["values"] == pytest.approx(values, abs=TOLERANCE)
    assert choice["chosen"] == int(np.argmax(values))
    assert choice["generated_tokens"] == sum(tokens)
    assert choice["tokens"] == report["tokens"] == tokens[choice["chosen"]]


@pytest.mark.parametrize("head", HEADS)
def test_the_best_of_the_replies_by_each_head(server: Server, slow: Slow, head: str) -> None:
    drawn = replies(server, 6)
    answer = ask(server, {**BEST, "value": head, "report": True}, **DRAW, ignore_eos=False)
    values = expect_best(answer, drawn, slow, head)
    assert len({tuple(ids_of(drawn, i)) for i in range(6)}) == 6, "the seeds are the same"
    expect_report(answer["steering"], values, drawn)
    again = ask(server, {**BEST, "value": head}, **DRAW, ignore_eos=False)
    assert ids_of(again) == ids_of(answer), "a seed gives the same answer again"
    assert "steering" not in again


def test_a_passes_report_counts_every_draw_and_reading(server: Server) -> None:
    answer = ask(server, {**BEST, "n": 4, "report": "tokens"}, **DRAW)
    report = answer["steering"]
    assert report["streams"] == ["value"] and report["mean_kl"] == pytest.approx(0, abs=1e-6)
    tokens = report["tokens"]
    assert report["forward_passes_per_token"] == {"base": 4 * 9 / tokens, "value": 4 / tokens}
    details = report["choices"][0]["token_details"]
    assert [d["token_id"] for d in details] == ids_of(answer)


def test_one_reply_is_simply_returned(server: Server) -> None:
    answer = ask(server, {**BEST, "n": 1}, **{**DRAW, "temperature": 0})
    assert ids_of(answer) == ids_of(ask(server, **{**DRAW, "temperature": 0}))


def test_an_ended_reply_is_read_with_the_id_that_ended_it(server: Server, slow: Slow) -> None:
    likely = {"ignore_eos": False, "logit_bias": {str(EOS): 9.0}}
    drawn = replies(server, 8, **likely)
    ended = [ids_of(drawn, i)[-1] == EOS for i in range(8)]
    assert True in ended and False in ended
    answer = ask(server, {**BEST, "n": 8, "report": True}, **DRAW, **likely)
    values = expect_best(answer, drawn, slow, "value")
    expect_report(answer["steering"], values, drawn)


def test_stop_strings_cut_replies_before_they_are_read(server: Server, slow: Slow) -> None:
    texts = [choice["text"] for choice in replies(server, 6)["choices"]]
    stop = [text[len(text) // 2] for text in texts[:3]]
    drawn = replies(server, 6, stop=stop)
    assert {c["finish_reason"] for c in drawn["choices"]} >= {"stop"}
    answer = ask(server, BEST, **DRAW, ignore_eos=False, stop=stop)
    expect_best(answer, drawn, slow, "value")


@pytest.mark.parametrize("head", ["value", "probe"])
def test_replies_of_an_adapted_base(server: Server, tuned: Slow, head: str) -> None:
    drawn = replies(server, 5, model="tuned")
    answer = ask(server, {**BEST, "n": 5, "value": head, "report": True},
                 **{**DRAW, "model": "tuned"}, ignore_eos=False)  # fmt: skip
    values = expect_best(answer, drawn, tuned, head)
    expect_report(answer["steering"], values, drawn)
    assert answer["steering"]["adapters"][0]["name"] == "tuned"
    assert ids_of(drawn) != ids_of(replies(server, 5)), "the adapter changes nothing"


def test_the_head_reads_a_prompt_of_its_own(server: Server, slow: Slow) -> None:
    drawn = replies(server, 6)
    for own in ([5, 6, 7], list(range(20, 60))):
        steering = {**BEST, "prompts": {"value": {"token_ids": own}}, "report": True}
        answer = ask(server, steering, **DRAW, ignore_eos=False)
        values = [slow.head("value", [*own, *ids_of(drawn, i)]) for i in range(6)]
        expect_report(answer["steering"], values, drawn)
        assert answer["usage"]["prompt_tokens"] == len(PROMPT)


def test_several_prompts_have_a_choice_each(server: Server, slow: Slow) -> None:
    prompts = [PROMPT, PROMPT[3:]]
    answer = ask(server, {**BEST, "n": 3, "report": True}, **{**DRAW, "prompt": prompts})
    report = answer["steering"]
    assert report["best_of_n"]["generated_tokens"] == 2 * 3 * 9
    assert [choice["index"] for choice in report["choices"]] == [0, 1]
    for i, (prompt, choice) in enumerate(zip(prompts, report["choices"], strict=True)):
        assert choice["chosen"] == int(np.argmax(choice["values"]))
        value = slow.head("value", [*prompt, *ids_of(answer, i)])
        assert max(choice["values"]) == pytest.approx(value, abs=TOLERANCE)


def test_a_stream_gives_the_same_reply_when_it_is_chosen(server: Server) -> None:
    whole = ask(server, {**BEST, "report": True}, **DRAW)
    body = {**DRAW, "ignore_eos": True, "stream": True, "steering": {**BEST, "report": True},
            "stream_options": {"include_usage": True}}  # fmt: skip
    chunks = events(server, "/v1/completions", body)
    text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
    assert text == whole["choices"][0]["text"]
    usage = next(c["usage"] for c in chunks if c.get("usage"))
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    report = next(c["steering"] for c in chunks if "steering" in c)
    assert report["best_of_n"] == whole["steering"]["best_of_n"]
    (told,), (want,) = report["choices"], whole["steering"]["choices"]
    assert told["values"] == pytest.approx(want["values"], abs=TOLERANCE)
    assert told["chosen"] == want["chosen"]


def test_chat_and_the_responses_api_choose_too(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    messages: Any = [{"role": "user", "content": "Who wrote the letter"}]
    extra = {"steering": {"report": True}}
    one = client.chat.completions.create(
        model="picky", messages=messages, max_tokens=8, seed=3, logprobs=True, extra_body=extra
    )
    report = one.steering  # type: ignore[attr-defined]
    assert (report["profile"], report["best_of_n"]["n"]) == ("picky", 4)
    assert one.choices[0].logprobs is not None and one.choices[0].logprobs.content
    streamed = client.chat.completions.create(
        model="picky", messages=messages, max_tokens=8, seed=3, stream=True
    )
    parts = [c.choices[0].delta.content or "" for c in streamed if c.choices]
    assert "".join(parts) == one.choices[0].message.content
    answer = client.responses.create(
        model="picky", input="Who wrote the letter", max_output_tokens=8, extra_body=extra
    )
    assert answer.steering["best_of_n"]["value"] == "value"  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.output_tokens <= 8
    kinds = [event.type for event in client.responses.create(
        model="picky", input="Who wrote the letter", max_output_tokens=8, stream=True
    )]  # fmt: skip
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_a_schema_holds_for_the_chosen_reply(server: Server) -> None:
    schema = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}},
              "required": ["answer"], "additionalProperties": False}  # fmt: skip
    body = {"model": "picky", "messages": [{"role": "user", "content": "Is water wet?"}],
            "max_tokens": 120, "response_format": {"type": "json_schema", "json_schema": {
                "name": "a", "schema": schema, "strict": True}}}  # fmt: skip
    answer = server.post("/v1/chat/completions", body).json()
    assert json.loads(answer["choices"][0]["message"]["content"])["answer"] in ("yes", "no")


def test_a_reply_that_fills_the_context_leaves_one_token(server: Server, slow: Slow) -> None:
    """The context has 256 tokens; a prompt can be read only where one more could be drawn."""
    prompt = [10 + i % 300 for i in range(250)]
    for asked in (None, 6):
        more: dict[str, Any] = {**DRAW, "prompt": prompt, "max_tokens": asked}
        answer = ask(server, {**BEST, "n": 2, "report": True}, **more)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert len(ids_of(answer)) == 256 - 250 - 1
        (choice,) = answer["steering"]["choices"]
        value = slow.head("value", [*prompt, *ids_of(answer)])
        assert max(choice["values"]) == pytest.approx(value, abs=TOLERANCE)
    full = [*prompt, 1, 2, 3, 4, 5]
    assert server.post("/v1/completions", {**DRAW, "prompt": full}).status_code == 200
    refused = server.post("/v1/completions", {**DRAW, "prompt": full, "steering": BEST})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    assert "at most 254" in refused.json()["error"]["message"]


def running(server: Server) -> float:
    """Requests in the engine, running or waiting."""
    lines = server.get("/metrics").text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


async def asked(server: Server, body: dict[str, Any], patience: float) -> None:
    """One request by a client that waits so many seconds, whatever comes in between.

    Raises:
        TimeoutError: it has left.
    """
    async with httpx.AsyncClient(timeout=None) as client:
        await asyncio.wait_for(client.post(f"{server.url}/v1/completions", json=body), patience)


def test_a_stream_begins_at_once_and_is_kept_while_replies_are_drawn(server: Server) -> None:
    """Proxies cut connections that are silent for long; nothing is there before all are drawn."""
    best = {**BEST, "n": MOST}
    body = {**DRAW, "ignore_eos": True, "stream": True, "steering": best, "max_tokens": 240}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    # The first of them is sent long before a reply is there.
    assert lines[0] == ": keep-alive"
    assert lines.count(": keep-alive") > 1
    assert lines[-1] == "data: [DONE]"


LONG = {"value": {"token_ids": list(range(10, 250))}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 200}, {"max_tokens": 1, "steering": {**BEST, "n": MOST, "prompts": LONG}}],
    ids=["mostly drawn", "mostly read"],
)
def test_a_client_that_leaves_frees_everything(
    server: Server, change: dict[str, Any], stream: bool
) -> None:
    best = {**BEST, "n": MOST, "report": "tokens"}
    body = {**DRAW, "ignore_eos": True, "stream": stream, "steering": best, **change}
    left, whole = 0, 10.0
    while left < 5:
        begin = time.monotonic()
        try:
            patience = whole * (0.1 + 0.2 * left)
            asyncio.run(asked(server, body, patience))
            whole = min(whole, time.monotonic() - begin)  # it was answered: less next time
        except TimeoutError:
            left += 1
    until(lambda: running(server) == 0 and server.get("/ready").json()["in_flight"] == 0)
    log = server.log.read_text()
    assert not [word for word in ("Traceback", "never retrieved", "asyncgen") if word in log]
    assert len(ids_of(ask(server, BEST, **DRAW))) == 9
