"""LiteLLM: the providers `openai/` and `hosted_vllm/`, its own exception classes."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

from load_tests.clients.asking import (
    KEY,
    LIMITED_KEY,
    MESSAGES,
    PROMPT,
    QUESTION,
    ROOM,
    SCHEMA,
    STATEMENT,
    STEERING,
    URL,
    cut,
    is_right,
    stops,
    wait_idle,
)
from load_tests.clients.checks import Checks, refused

check = Checks("litellm", "litellm")
litellm.num_retries = 0
litellm.suppress_debug_info = True
litellm.disable_stop_sequence_limit = True  # it cuts stop lists to OpenAI's four otherwise

PROVIDERS = ("openai", "hosted_vllm")
HERE: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0, "timeout": 50}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "paint", "parameters": SCHEMA, "strict": True},
}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "paint"}}


def chat(model: str = "openai/base", messages: Any = MESSAGES, **more: Any) -> Any:
    """One greedy chat completion."""
    options = {**HERE, "temperature": 0, "max_tokens": 24, **more}
    return litellm.completion(model=model, messages=messages, **options)


def said(answer: Any) -> str:
    """The text of its first choice."""
    text: str = answer.choices[0].message.content
    return text


@check("chat by openai/ and hosted_vllm/: whole, streamed, a profile as the model")
def both() -> None:
    texts = set()
    for provider in PROVIDERS:
        whole = chat(f"{provider}/chat")
        chunks = list(chat(f"{provider}/chat", stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == said(whole)
        assert whole.usage.completion_tokens > 0
        texts.add(said(whole))
    assert len(texts) == 1


@check("steering and adapters, by extra_body and as fields of hosted_vllm/")
def steering() -> None:
    want, other = said(chat("openai/chat")), said(chat("openai/base"))
    assert want != other
    assert said(chat(extra_body={"steering": STEERING})) == want
    assert said(chat("hosted_vllm/base", steering=STEERING)) == want
    asked = said(chat("openai/ask", STATEMENT))
    adapters = [{"name": "ask"}]
    assert said(chat("hosted_vllm/base", STATEMENT, adapters=adapters)) == asked
    assert said(chat("openai/base", STATEMENT)) != asked


@check("text completions, with log-probabilities")
def completions() -> None:
    for provider in ("text-completion-openai", "hosted_vllm"):
        answer = litellm.text_completion(
            model=f"{provider}/base",
            prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2, **HERE,
        )  # fmt: skip
        assert answer.choices[0].text


@check("chat: log-probabilities")
def logprobs() -> None:
    answer = chat(logprobs=True, top_logprobs=3, max_tokens=4)
    found = answer.choices[0].logprobs.content
    assert len(found) == 4 and all(len(token.top_logprobs) == 3 for token in found)


@check("tools: named, required, auto, streamed, and the result back")
def tools() -> None:
    for choice in (NAMED, "required"):
        answer = chat(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=ROOM)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "paint" and is_right(json.loads(call.function.arguments))
    assert said(chat("openai/chat", tools=[TOOL], tool_choice="auto"))
    stream = chat(tools=[TOOL], tool_choice=NAMED, max_tokens=ROOM, stream=True)
    whole = litellm.stream_chunk_builder(list(stream))
    assert is_right(json.loads(whole.choices[0].message.tool_calls[0].function.arguments))
    message = answer.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "A crow."}
    assert said(chat("openai/chat", [*MESSAGES, message, result], tools=[TOOL]))


@check("JSON schema by response_format")
def schema() -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True},
    }
    for provider in PROVIDERS:
        answer = chat(f"{provider}/base", response_format=form, max_tokens=ROOM)
        assert is_right(json.loads(said(answer)))


@check("what it sends beside the rest: metadata, user, unknown fields, a stop list of 16")
def unknown() -> None:
    want = said(chat("openai/chat"))
    for provider in PROVIDERS:
        options = {"metadata": {"trace": "a"}, "user": "me", "surprise": {"a": 1}}
        answer = chat(f"{provider}/chat", **options)
        assert said(answer) == want
    word, before = cut(want)
    for count in (5, 16):
        assert said(chat("openai/chat", stop=stops(word, count))) == before, count


@check("errors: its exception classes")
def errors() -> None:
    for provider in PROVIDERS:
        with refused(litellm.BadRequestError, "strength"):
            chat(f"{provider}/base", extra_body={"steering": {**STEERING, "strength": 1000}})
        with refused(litellm.NotFoundError, "nobody"):
            chat(f"{provider}/nobody")
        with refused(litellm.AuthenticationError):
            chat(f"{provider}/base", api_key="wrong")
        with refused(litellm.RateLimitError):
            for _ in range(2):
                chat(f"{provider}/base", api_key=LIMITED_KEY, max_tokens=1)


@check("errors: a prompt longer than the context is ContextWindowExceededError")
def too_long() -> None:
    long = [{"role": "user", "content": "What is the pet of Dorwyn Bramley? " * 200}]
    with refused(litellm.ContextWindowExceededError):
        chat(messages=long)


@check("embeddings are refused: NotFoundError")
def embeddings() -> None:
    with refused(litellm.NotFoundError):
        litellm.embedding(model="openai/base", input=["x"], **HERE)


@check("time-out, and asynchronous calls at the same time")
async def together() -> None:
    want = said(await asyncio.to_thread(chat, "openai/chat"))
    ask = {**HERE, "model": "openai/chat", "messages": MESSAGES, "temperature": 0}
    calls = (litellm.acompletion(**ask, max_tokens=24) for _ in range(8))
    assert {said(answer) for answer in await asyncio.gather(*calls)} == {want}
    late = {**ask, "timeout": 0.3, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with refused(litellm.Timeout):
        await litellm.acompletion(**late)
    await asyncio.to_thread(wait_idle)


@check("responses: whole and streamed")
def responses() -> None:
    ask = {**HERE, "model": "openai/chat", "input": QUESTION, "temperature": 0}
    whole = litellm.responses(**ask, max_output_tokens=24)
    text = whole.output[-1].content[0].text
    assert text == said(chat("openai/chat"))
    events = list(litellm.responses(**ask, max_output_tokens=24, stream=True))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == text


if __name__ == "__main__":
    sys.exit(check.run())
