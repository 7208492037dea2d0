"""The `anthropic` package: `/v1/messages`, streamed, with tools, steered like the others."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import anthropic

from load_tests.clients.asking import (
    KEY,
    LIMITED_KEY,
    MESSAGES,
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

check = Checks("anthropic", "anthropic")
client: Any = anthropic.Anthropic(
    base_url=URL, api_key=None, auth_token=KEY, max_retries=0, timeout=50
)
TOOL: dict[str, Any] = {
    "name": "paint", "description": "Paints.", "input_schema": SCHEMA, "strict": True,
}  # fmt: skip


def ask(model: str = "base", messages: Any = MESSAGES, **more: Any) -> Any:
    """One greedy message."""
    options: dict[str, Any] = {"max_tokens": 24, **more}
    # The package has no argument for the temperature any more; `/v1/messages` has the field.
    options["extra_body"] = {"temperature": 0, **more.get("extra_body", {})}
    return client.messages.create(model=model, messages=messages, **options)


def said(message: Any) -> str:
    """The text of its blocks."""
    return "".join(block.text for block in message.content if block.type == "text")


@check("messages: a system prompt, several turns, content blocks, usage")
def messages() -> None:
    first = ask("chat", system="You answer questions.")
    assert said(first) and first.role == "assistant" and first.stop_reason == "end_turn"
    assert first.usage.input_tokens > 0 and first.usage.output_tokens > 0
    blocks = [{"type": "text", "text": MESSAGES[0]["content"]}]
    turns = [
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": said(first)},
        *MESSAGES,
    ]
    assert said(ask("chat", turns))
    assert ask("chat", max_tokens=2).stop_reason == "max_tokens"


@check("messages, streamed: the events in order, the deltas are the whole answer")
def streamed() -> None:
    whole = ask("chat")
    events = list(ask("chat", stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds
    assert kinds.index("content_block_start") < kinds.index("content_block_delta")
    assert kinds.index("content_block_stop") < kinds.index("message_delta")
    with client.messages.stream(
        model="chat", messages=MESSAGES, max_tokens=24, extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream) == said(whole)
        last = stream.get_final_message()
    assert last.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens


@check("steering and adapters: as the model and by extra_body")
def steering() -> None:
    want = said(ask("chat"))
    assert said(ask(extra_body={"steering": STEERING})) == want != said(ask())
    asked = said(ask("ask", STATEMENT))
    assert said(ask(messages=STATEMENT, extra_body={"adapters": [{"name": "ask"}]})) == asked
    assert said(ask(messages=STATEMENT)) != asked


@check("tools: tool_choice any, a name and auto")
def tools() -> None:
    for named in ({"type": "any"}, {"type": "tool", "name": "paint"}):
        choice: dict[str, Any] = {**named, "disable_parallel_tool_use": True}
        message = ask(tools=[TOOL], tool_choice=choice, max_tokens=ROOM)
        (use, *_) = [block for block in message.content if block.type == "tool_use"]
        assert use.name == "paint" and is_right(use.input), use.input
        assert message.stop_reason == "tool_use"
    assert said(ask("chat", tools=[TOOL], tool_choice={"type": "auto"}))


@check("tools, streamed: input_json deltas are one object; the result goes back")
def tools_streamed() -> None:
    choice = {"type": "tool", "name": "paint"}
    with client.messages.stream(
        model="base", messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=ROOM,
        extra_body={"temperature": 0},
    ) as stream:  # fmt: skip
        message = stream.get_final_message()
    (use, *_) = [block for block in message.content if block.type == "tool_use"]
    assert is_right(use.input), use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "A crow."}
    call = {"type": "tool_use", "id": use.id, "name": use.name, "input": use.input}
    back = [
        *MESSAGES,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert said(ask("chat", back, tools=[TOOL]))


@check("stop_sequences: 1, 5 and 16 strings cut the reply")
def stop_lists() -> None:
    word, before = cut(said(ask("chat")))
    for count in (1, 5, 16):
        message = ask("chat", stop_sequences=stops(word, count))
        assert said(message) == before, count
        assert message.stop_reason == "stop_sequence" and message.stop_sequence == word


@check("count_tokens counts what messages then uses")
def count() -> None:
    found = client.messages.count_tokens(model="base", messages=MESSAGES).input_tokens
    assert found == ask().usage.input_tokens


@check("fields that nobody knows are ignored; `metadata` and beta headers too")
def unknown() -> None:
    answer = ask(
        "chat", metadata={"user_id": "me"}, extra_body={"surprise": 1},
        extra_headers={"anthropic-beta": "some-beta-2026-01-01"},
    )  # fmt: skip
    assert said(answer) == said(ask("chat"))


@check("errors: its exception classes and its shape")
def errors() -> None:
    with refused(anthropic.BadRequestError, "strength") as found:
        ask(extra_body={"steering": {**STEERING, "strength": 1000}})
    body = found.error.body
    assert body["type"] == "error", body
    assert body["error"]["type"] == "invalid_request_error", body
    assert body["error"]["message"], body
    with refused(anthropic.NotFoundError, "nobody") as found:
        ask("nobody")
    assert found.error.body["error"]["type"] == "not_found_error", found.error.body
    with refused(anthropic.AuthenticationError) as found:
        client.with_options(auth_token="wrong").messages.create(
            model="base", messages=MESSAGES, max_tokens=1
        )
    assert found.error.body["error"]["type"] == "authentication_error", found.error.body
    with refused(anthropic.RateLimitError) as found:
        for _ in range(2):
            client.with_options(auth_token=LIMITED_KEY).messages.create(
                model="base", messages=MESSAGES, max_tokens=1
            )
    assert found.error.body["error"]["type"] == "rate_limit_error", found.error.body


@check("the key as `x-api-key`, as the package sends it by default")
def own_header() -> None:
    usual = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    assert usual.messages.create(model="base", messages=MESSAGES, max_tokens=2).content  # type: ignore[arg-type]
    with refused(anthropic.AuthenticationError):
        wrong: Any = anthropic.Anthropic(base_url=URL, api_key="wrong", max_retries=0)
        wrong.messages.create(model="base", messages=MESSAGES, max_tokens=2)


@check("time-out and cancel end the request; asynchronous calls at the same time")
async def together() -> None:
    want = said(await asyncio.to_thread(ask, "chat"))
    long: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 400}
    with refused(anthropic.APITimeoutError):
        await asyncio.to_thread(
            client.with_options(timeout=0.02).messages.create,
            **long, extra_body={"ignore_eos": True},
        )  # fmt: skip
    await asyncio.to_thread(wait_idle)
    async with anthropic.AsyncAnthropic(
        base_url=URL, api_key=None, auth_token=KEY, max_retries=0
    ) as many:
        short: Any = {**long, "max_tokens": 24, "extra_body": {"temperature": 0}}
        answers = await asyncio.gather(*(many.messages.create(**short) for _ in range(8)))
        assert {said(answer) for answer in answers} == {want}
        stream: Any = await many.messages.create(
            **long, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
    await asyncio.to_thread(wait_idle)


if __name__ == "__main__":
    sys.exit(check.run())
