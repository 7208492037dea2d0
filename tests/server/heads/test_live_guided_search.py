"""guided_search over HTTP: texts, streams, choices, limits, and clients that leave.

`tests/recipes/test_search.py` has what is drawn, scored and chosen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import openai
import pytest

from tests.models import EOS, make_tokenizer
from tests.server.api.asking import events
from tests.server.heads.asking import BEST, DRAW, PROMPT, TOLERANCE, ask, ids_of
from tests.server.heads.headed import MOST
from tests.server.heads.test_live_best_of_n import asked, running
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SEARCH: dict[str, Any] = {
    "method": "guided_search", "k": 3, "block": {"tokens": 4}, "score": {"value": "value"},
}  # fmt: skip
GREEDY = {"temperature": 0, "ignore_eos": False, "max_tokens": 14}
BYTES = [i for i in range(7, 263) if "\ufffd" in make_tokenizer().decode([i])]
"""Tokens of one byte that is no character."""


def blocks(size: int, **more: Any) -> dict[str, Any]:
    """One block at a time: the search changes nothing."""
    return {**SEARCH, "k": 1, "block": {"tokens": size, **more}}


def expect_same(found: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    (one,), (other,) = found["choices"], want["choices"]
    for key in ("text", "token_ids", "finish_reason", "stop_reason", "index"):
        assert one[key] == other[key], key
    told, expected = one["logprobs"], other["logprobs"]
    for key in ("tokens", "text_offset"):
        assert told[key] == expected[key], key
    assert told["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=TOLERANCE)
    assert [*map(list, told["top_logprobs"])] == [*map(list, expected["top_logprobs"])]
    assert found["usage"]["completion_tokens"] == want["usage"]["completion_tokens"]
    assert found["usage"]["prompt_tokens"] == want["usage"]["prompt_tokens"]


def text_of(server: Server, body: dict[str, Any], index: int = 0) -> str:
    chunks = events(server, "/v1/completions", {**body, "stream": True})
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(choice["text"] for choice in choices)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stop": ["?"]},
        {"stop": ["?"], "include_stop_str_in_output": True},
        {"stop": ["?"], "min_tokens": 9},
        {"logit_bias": {str(EOS): 6.0}},
        {"logit_bias": {str(EOS): 6.0}, "min_tokens": 5},
        {"allowed_token_ids": BYTES},
        {"allowed_token_ids": BYTES, "prompt": [*PROMPT, BYTES[3]]},
    ],
    ids=["plain", "stop", "stop kept", "stop late", "end", "end late", "bytes", "bytes before"],
)
def test_a_reply_in_blocks_is_the_reply_as_a_whole(
    server: Server, size: int, change: dict[str, Any]
) -> None:
    """Text, log-probabilities and end, across borders of blocks."""
    more: dict[str, Any] = {**DRAW, **GREEDY, **change}
    if "stop" in change:
        whole = ask(server, **{**more, "stop": None})["choices"][0]["text"]
        more["stop"] = [whole[4:9], whole[9:12]]  # across tokens, wherever they lie
    want = ask(server, **more)
    assert "bytes" not in str(change) or "\ufffd" in want["choices"][0]["text"]
    expect_same(ask(server, blocks(size), **more), want)
    assert text_of(server, {**more, "steering": blocks(size)}) == want["choices"][0]["text"]


def test_a_block_ends_with_a_text_and_the_reply_goes_on(server: Server) -> None:
    more = {**DRAW, **GREEDY}
    want = ask(server, **more)
    token = want["choices"][0]["logprobs"]["tokens"][5]
    found = ask(server, {**blocks(50, until=token), "report": "tokens"}, **more)
    expect_same(found, want)
    (choice,) = found["steering"]["choices"]
    (block, *rest) = [draw for one in choice["rounds"] for draw in one["draws"]]
    assert rest and block["tokens"] < 14 and token in "".join(block["text_tokens"])


def test_one_block_that_takes_all_is_best_of_n(server: Server) -> None:
    more = {**DRAW, "ignore_eos": False}
    spec = {**SEARCH, "k": 6, "block": {"tokens": 100}, "report": True}
    found, want = ask(server, spec, **more), ask(server, {**BEST, "report": True}, **more)
    expect_same(found, want)
    (one,), (other,) = found["steering"]["choices"], want["steering"]["choices"]
    assert [draw["value"] for draw in one["rounds"][0]["draws"]] == pytest.approx(
        other["values"], abs=TOLERANCE
    )
    assert one["forward_passes_per_token"] == other["forward_passes_per_token"]
    assert one["generated_tokens"] == other["generated_tokens"]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stream_has_what_is_settled_block_by_block(server: Server, beams: int) -> None:
    spec = {**SEARCH, "beams": beams, "report": True}
    body = {**DRAW, "max_tokens": 16, "ignore_eos": True, "steering": spec}
    whole = ask(server, **{k: v for k, v in body.items() if k != "logprobs"})
    options = {"stream": True, "logprobs": 1, "return_token_ids": True,
               "stream_options": {"include_usage": True}}  # fmt: skip
    chunks = events(server, "/v1/completions", {**body, **options})
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    ids = [token for part in parts for token in part["token_ids"] or ()]
    assert "".join(part["text"] for part in parts) == whole["choices"][0]["text"]
    assert ids == ids_of(whole)
    told = [p for part in parts for p in (part["logprobs"] or {}).get("token_logprobs", ())]
    want = whole["choices"][0]["logprobs"]["token_logprobs"]
    assert told == pytest.approx(want, abs=TOLERANCE)
    assert len(parts) >= 4 if beams == 1 else len(parts) >= 1
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    usage = next(chunk["usage"] for chunk in chunks if chunk.get("usage"))
    assert usage["completion_tokens"] == 16
    report = next(chunk["steering"] for chunk in chunks if "steering" in chunk)
    assert report["guided_search"] == whole["steering"]["guided_search"]


def test_several_choices_are_searches_of_their_own(server: Server) -> None:
    spec = {**SEARCH, "report": True}
    one, both = (ask(server, spec, **DRAW, n=n, ignore_eos=True) for n in (1, 2))
    assert [c["index"] for c in both["choices"]] == [0, 1]
    assert ids_of(both, 0) == ids_of(one) != ids_of(both, 1)
    assert both["usage"]["completion_tokens"] == 18
    assert both["usage"]["prompt_tokens"] == len(PROMPT)
    first, second = both["steering"]["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert both["steering"]["guided_search"]["generated_tokens"] == 2 * 3 * 9
    body = {**DRAW, "ignore_eos": True, "n": 2, "steering": SEARCH}
    for index in (0, 1):
        assert text_of(server, body, index) == both["choices"][index]["text"]
    prompts = [PROMPT, PROMPT[3:]]
    two = ask(server, spec, **{**DRAW, "prompt": prompts}, ignore_eos=True)
    assert ids_of(two, 0) == ids_of(one) and len(two["steering"]["choices"]) == 2


def test_all_drawn_tokens_are_counted(server: Server) -> None:
    """By the metrics and the limits of callers; the answer's usage has the reply."""

    def drawn() -> tuple[float, float]:
        lines = server.get("/metrics").text.splitlines()
        mine = [x for x in lines if x.startswith("coxswain_tokens_total") and "guided" in x]
        return tuple(
            sum(float(x.rsplit(" ", 1)[1]) for x in mine if f'"{kind}"' in x)
            for kind in ("output", "prompt")
        )  # type: ignore[return-value]

    before = drawn()
    ask(server, SEARCH, **DRAW, ignore_eos=True)
    until(lambda: drawn()[0] > before[0])
    assert drawn() == (before[0] + 3 * 9, before[1] + len(PROMPT))


def test_a_head_and_streams_read_prompts_of_their_own(server: Server, slow: Any) -> None:
    for own in ([5, 6, 7], list(range(20, 60))):
        spec = {**SEARCH, "prompts": {"value": {"token_ids": own}}, "report": "tokens"}
        (choice,) = ask(server, spec, **DRAW, ignore_eos=True)["steering"]["choices"]
        reply: list[int] = []
        for one in choice["rounds"]:
            for draw in one["draws"]:
                want = slow.head("value", [*own, *reply, *draw["token_ids"]])
                assert draw["value"] == pytest.approx(want, abs=TOLERANCE)
            reply += one["draws"][one["kept"][0]]["token_ids"]


def test_an_adapted_base_is_searched(server: Server, tuned: Any) -> None:
    spec = {**SEARCH, "score": {"value": "probe"}, "report": "tokens"}
    answer = ask(server, spec, **{**DRAW, "model": "tuned"}, ignore_eos=True)
    (choice,) = answer["steering"]["choices"]
    reply: list[int] = []
    for one in choice["rounds"]:
        for draw in one["draws"]:
            want = tuned.head("probe", [*PROMPT, *reply, *draw["token_ids"]])
            assert draw["value"] == pytest.approx(want, abs=TOLERANCE)
        reply += one["draws"][one["kept"][0]]["token_ids"]
    assert reply == ids_of(answer)
    assert answer["steering"]["adapters"][0]["name"] == "tuned"


def test_the_base_runs_only_where_it_is_needed(server: Server) -> None:
    spec = {**SEARCH, "draw": "plain", "accept": {"at_least": -1e5}, "k": 2}
    found = ask(server, {**spec, "report": True}, **DRAW, ignore_eos=True)["steering"]
    assert found["guided_search"]["accepted"] == 3 and found["guided_search"]["rejected"] == 0
    assert found["forward_passes_per_token"].keys() == {"plain", "value"}
    assert found["mean_kl"] is None and found["share_changed"] is None
    refused = ask(server, {**spec, "accept": {"at_least": 1e5}, "report": True}, **DRAW,
                  ignore_eos=True)["steering"]  # fmt: skip
    assert refused["guided_search"]["rejected"] == 3
    assert refused["forward_passes_per_token"]["base"] == 1
    assert refused["mean_kl"] == pytest.approx(0, abs=1e-6)


def test_chat_searches_too(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    messages: Any = [{"role": "user", "content": "Who wrote the letter"}]
    extra = {"steering": {"report": True}}
    asked_for: dict[str, Any] = {"model": "seeking", "messages": messages, "max_tokens": 8,
                                 "seed": 3}  # fmt: skip
    one = client.chat.completions.create(**asked_for, logprobs=True, extra_body=extra)
    assert one.choices[0].logprobs is not None and one.choices[0].logprobs.content
    streamed = client.chat.completions.create(**asked_for, stream=True, extra_body=extra)
    parts = [c.choices[0].delta.content or "" for c in streamed if c.choices]
    assert one.steering["guided_search"]["k"] == 2
    assert "".join(parts) == one.choices[0].message.content


BAD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"k": 0}, {}, "steering.k", f"1 to {MOST}"),
    ({"k": MOST, "beams": 2}, {}, "steering.beams", f"1 to {MOST}"),
    ({"block": {}}, {}, "steering.block.until", "tokens, until or both"),
    ({"block": {"tokens": 0}}, {}, "steering.block.tokens", "≥ 1"),
    ({"score": {}}, {}, "steering.score.log_ratio", "value, log_ratio or both"),
    ({"score": {"value": "plain"}}, {}, "steering.score.value", "critic, kind, probe, value"),
    ({"score": {"log_ratio": {"of": "plain", "to": "plain"}}}, {}, "steering.score.log_ratio.to",
     "different"),
    ({"score": {"log_ratio": {"of": "plain", "to": "value"}}}, {}, "steering.score.log_ratio.to",
     "base, plain, twin"),
    ({"draw": "value"}, {}, "steering.draw.value", "value head"),
    ({"draw": {"base": 0.0}}, {}, "steering", "weights are 0"),
    ({"beta": 2.0}, {}, "steering.beta", "choose: sample"),
    ({"choose": "sample", "beta": 0.0}, {}, "steering.beta", "> 0"),
    ({"beams": 2, "accept": {"at_least": 0}}, {}, "steering.accept", "one beam"),
    ({"fallback": {"k": 1}}, {}, "steering.fallback", "accept"),
    ({"accept": {"at_least": 0}, "fallback": {"k": 2}}, {}, "steering.fallback.score", "score"),
    ({}, {"temperature": 0}, "temperature", "same block"),
    ({}, {"presence_penalty": 0.5}, "presence_penalty", "blocks"),
    ({}, {"frequency_penalty": 0.5}, "frequency_penalty", "blocks"),
    ({}, {"bad_words": ["boat"]}, "bad_words", "blocks"),
    ({}, {"structured_outputs": {"regex": "[a-z]+"}}, "structured_outputs", "blocks"),
    ({}, {"echo": True, "logprobs": 1}, "steering", "of the prompt"),
    ({}, {"use_beam_search": True}, "use_beam_search", "not possible"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("steering", "change", "param", "words"), BAD)
def test_what_does_not_go_is_refused_by_name(
    server: Server,
    steering: dict[str, Any],
    change: dict[str, Any],
    param: str,
    words: str,
    stream: bool,
) -> None:
    body = {**DRAW, "stream": stream, "steering": {**SEARCH, **steering}, **change}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_search(server: Server, stream: bool) -> None:
    spec = {**SEARCH, "k": 4, "beams": 2, "block": {"tokens": 6}, "report": "tokens"}
    spec["score"] = {"value": "value", "log_ratio": {"of": "plain", "to": "twin"}}
    body = {**DRAW, "ignore_eos": True, "stream": stream, "steering": spec, "max_tokens": 160}
    left, whole = 0, 10.0
    while left < 4:
        begin = time.monotonic()
        try:
            asyncio.run(asked(server, body, whole * (0.1 + 0.2 * left)))
            whole = min(whole, time.monotonic() - begin)  # it was answered: less next time
        except TimeoutError:
            left += 1
    until(lambda: running(server) == 0 and server.get("/ready").json()["in_flight"] == 0)
    log = server.log.read_text()
    assert not [word for word in ("Traceback", "never retrieved", "asyncgen") if word in log]
    assert len(ids_of(ask(server, SEARCH, **DRAW, ignore_eos=True))) == 9
