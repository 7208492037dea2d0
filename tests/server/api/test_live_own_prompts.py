"""Prompts of their own, over HTTP."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.api.asking import GREEDY, LONG, PROMPT, PROXY, complete, events, own, text
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": LONG + PROMPT},
        {"chat_template": LONG + "{{ messages[0].content }}"},
        {"messages": [{"role": "user", "content": LONG + PROMPT}]},
        {"token_ids": list(range(10, 80))},
    ],
)
def test_a_stream_reads_its_own_prompt_and_usage_is_the_base_s(
    server: Server, prompt: dict[str, Any]
) -> None:
    plain = complete(server, PROXY)
    steered = complete(server, own(prompt))
    assert text(steered) != text(plain)
    assert steered["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    again = complete(server, own(prompt))
    assert text(again) == text(steered)
    details = again["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] <= again["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_padding_for_a_longer_prompt_is_never_seen(server: Server, stream: bool) -> None:
    body = {"model": "big", **GREEDY, "steering": own({"prompt": LONG + PROMPT}), "stream": stream}

    def choices(**more: Any) -> list[dict[str, Any]]:
        asked = {**body, **more}
        if stream:
            return [c["choices"][0] for c in events(server, "/v1/completions", asked)]
        found: list[dict[str, Any]] = server.post("/v1/completions", asked).json()["choices"]
        return found

    echoed = "".join(choice["text"] for choice in choices(echo=True))
    answer = "".join(choice["text"] for choice in choices())
    assert echoed == PROMPT + answer
    ids = server.post("/tokenize", {"model": "big", "prompt": PROMPT}).json()["tokens"]
    told = [c["prompt_token_ids"] for c in choices(return_token_ids=True)]
    assert [t for t in told if t] == [ids]


def test_the_same_prompt_given_as_its_own_changes_nothing(server: Server) -> None:
    assert text(complete(server, own({"prompt": PROMPT}))) == text(complete(server, PROXY))
    template = {"chat_template": "{{ messages[0].content }}"}
    assert text(complete(server, own(template))) == text(complete(server, PROXY))


def test_batch_prompts_each_get_their_own(server: Server) -> None:
    prompts = [PROMPT, "The old mill beside the bridge"]
    steering = own({"chat_template": LONG + "{{ messages[0].content }}"})
    batch = complete(server, {**steering, "report": True}, prompt=prompts)
    single = [complete(server, steering, prompt=prompt) for prompt in prompts]
    assert [text(batch, 0), text(batch, 1)] == [text(s) for s in single]
    assert [c["index"] for c in batch["steering"]["choices"]] == [0, 1]
    total = sum(s["usage"]["prompt_tokens"] for s in single)
    assert batch["usage"]["prompt_tokens"] == total


def test_a_profile_brings_own_prompts_to_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    answers = [
        client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        for model in ("own", "big-chat")
    ]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content
    usages = [a.usage for a in answers]
    assert usages[0] is not None
    assert usages[1] is not None
    assert usages[0].prompt_tokens == usages[1].prompt_tokens


def test_guidance_with_a_twin(server: Server) -> None:
    found = complete(
        server,
        {"method": "guidance", "negative": "twin", "strength": 2,
         "prompts": {"twin": {"prompt": LONG + PROMPT}}, "report": True},
    )  # fmt: skip
    assert found["steering"]["streams"] == ["twin"]
