"""The `openai` package: the routes of its API, steering by `extra_body`, errors by class."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import openai
from pydantic import BaseModel

from load_tests.clients.asking import (
    KEY,
    LIMITED_KEY,
    MESSAGES,
    NARROW_KEY,
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

check = Checks("openai", "openai")
client: Any = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=50)

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints.",
        "parameters": SCHEMA,
        "strict": True,
    },
}
NAMED: Any = {"type": "function", "function": {"name": "paint"}}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True},
}


class Paint(BaseModel):
    """The schema as people write it."""

    colour: str
    sure: bool


def chat(model: str = "base", messages: Any = MESSAGES, **more: Any) -> Any:
    """One greedy chat completion."""
    options = {"temperature": 0, "max_tokens": 24, **more}
    return client.chat.completions.create(model=model, messages=messages, **options)


def said(answer: Any) -> str:
    """The text of its first choice."""
    text: str = answer.choices[0].message.content
    return text


@check("models: list and retrieve; an unknown one is NotFoundError")
def models() -> None:
    names = {card.id for card in client.models.list()}
    assert names == {"base", "chat", "ask", "brief"}, names
    assert client.models.retrieve("chat").id == "chat"
    with refused(openai.NotFoundError, "nobody"):
        client.models.retrieve("nobody")


@check("chat: a system prompt, several turns, usage")
def turns() -> None:
    first = chat("chat")
    messages = [
        {"role": "system", "content": "You answer questions."},
        *MESSAGES,
        {"role": "assistant", "content": said(first)},
        *MESSAGES,
    ]
    second = chat("chat", messages)
    assert said(second) and second.choices[0].finish_reason in ("stop", "length")
    usage = second.usage
    assert usage.prompt_tokens > first.usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@check("chat, streamed: the deltas are the whole answer, usage comes last")
def streamed() -> None:
    whole = chat("chat")
    chunks = list(chat("chat", stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == said(whole)
    last = chunks[-1]
    assert not last.choices and last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens


@check("chat: n=3 with a seed is drawn again the same; tokens have log-probabilities")
def drawn() -> None:
    options: Any = {"temperature": 1, "n": 3, "seed": 5, "logprobs": True, "top_logprobs": 2}
    one, two = (chat(**options) for _ in range(2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (one, two)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    for choice in one.choices:
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2


@check("completions: whole, streamed, several prompts, echo with log-probabilities")
def completions() -> None:
    ask: Any = {"model": "base", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**ask, echo=True, logprobs=2)
    found = whole.choices[0]
    assert found.text.startswith(PROMPT)
    assert found.logprobs.token_logprobs[0] is None and len(found.logprobs.top_logprobs[-1]) >= 2
    stream = client.completions.create(**ask, stream=True)
    assert PROMPT + "".join(c.choices[0].text for c in stream) == found.text
    many = client.completions.create(**{**ask, "prompt": [PROMPT, QUESTION]})
    assert [c.index for c in many.choices] == [0, 1]
    assert PROMPT + many.choices[0].text == found.text


@check("steering: a profile as the model is the same as its steering in extra_body")
def steering() -> None:
    by_model = chat("chat")
    by_body = chat(extra_body={"steering": {**STEERING, "report": True}})
    assert said(by_model) == said(by_body) != said(chat())
    report = by_body.model_extra["steering"]
    assert report["method"] == "proxy_tuning" and report["mean_kl"] > 0


@check("adapters: one as the model is the same as one in extra_body")
def adapters() -> None:
    by_model = chat("ask", STATEMENT)
    by_body = chat(messages=STATEMENT, extra_body={"adapters": [{"name": "ask"}]})
    assert said(by_model) == said(by_body) != said(chat(messages=STATEMENT))


@check("tools: named, required, auto, none")
def tools() -> None:
    for choice in (NAMED, "required"):
        answer = chat(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=ROOM)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "paint" and is_right(json.loads(call.function.arguments))
        assert answer.choices[0].finish_reason in ("tool_calls", "stop")
    for choice in ("auto", "none"):
        answer = chat("chat", tools=[TOOL], tool_choice=choice)
        assert said(answer) and not answer.choices[0].message.tool_calls


@check("tools, streamed: the pieces of the arguments are one object")
def tools_streamed() -> None:
    name, arguments = "", ""
    for chunk in chat(tools=[TOOL], tool_choice=NAMED, max_tokens=ROOM, stream=True):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            name = call.function.name or name
            arguments += call.function.arguments or ""
    assert name == "paint" and is_right(json.loads(arguments))


@check("tools: the result goes back, and the model answers")
def tools_back() -> None:
    answer = chat(tools=[TOOL], tool_choice=NAMED, max_tokens=ROOM)
    message = answer.choices[0].message
    call = message.tool_calls[0]
    back = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "A crow."},
    ]
    assert said(chat("chat", back, tools=[TOOL]))


@check("JSON schema: response_format, and chat.completions.parse with a Pydantic class")
def schema() -> None:
    assert is_right(json.loads(said(chat(response_format=FORMAT, max_tokens=ROOM))))
    assert is_right(json.loads(said(chat("chat", response_format=FORMAT, max_tokens=ROOM))))
    parsed = client.chat.completions.parse(
        model="base", messages=MESSAGES, response_format=Paint, max_tokens=300, temperature=0,
        extra_body={"structured_outputs": {"json": SCHEMA}, "response_format": None},
    )  # fmt: skip
    assert isinstance(parsed.choices[0].message.parsed, Paint)


@check("stop lists of 1, 5 and 16 strings cut the reply")
def stop_lists() -> None:
    text = said(chat("chat"))
    word, before = cut(text)
    for count in (1, 5, 16):
        answer = chat("chat", stop=stops(word, count))
        assert said(answer) == before, count
        assert answer.choices[0].finish_reason == "stop"


@check("fields that nobody knows are ignored; a typo inside `steering` is BadRequestError")
def unknown() -> None:
    options = {"service_tier": "auto", "user": "me", "metadata": {"a": "b"}, "store": False}
    answer = chat("chat", extra_body={"enable_thinking": False, "surprise": {"a": [1]}}, **options)
    assert said(answer) == said(chat("chat"))
    with refused(openai.BadRequestError, "strenght"):
        chat(extra_body={"steering": {**STEERING, "strenght": 1}})


@check("errors: BadRequestError names the field, also before a stream begins")
def bad_request() -> None:
    for stream in (False, True):
        with refused(openai.BadRequestError, "temperature") as found:
            chat(temperature=-1, stream=stream)
        assert found.error.type == "invalid_request_error" and found.error.param == "temperature"
    with refused(openai.BadRequestError, "strength") as found:
        chat(extra_body={"steering": {**STEERING, "strength": 1000}})
    assert found.error.param == "steering.strength"


@check("errors: a prompt longer than the context is context_length_exceeded")
def too_long() -> None:
    long = [{"role": "user", "content": "What is the pet of Dorwyn Bramley? " * 200}]
    with refused(openai.BadRequestError) as found:
        chat(messages=long)
    assert found.error.code == "context_length_exceeded", found.error.code
    with refused(openai.BadRequestError) as found:
        client.completions.create(model="base", prompt="a b c d " * 400, max_tokens=4)
    assert found.error.code == "context_length_exceeded", found.error.code


@check("errors: an unknown model is NotFoundError with model_not_found")
def no_model() -> None:
    with refused(openai.NotFoundError, "nobody") as found:
        chat("nobody")
    assert found.error.code == "model_not_found"


@check("errors: a wrong key is AuthenticationError, a forbidden profile is no BadRequestError")
def no_key() -> None:
    with refused(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(
            model="base", messages=MESSAGES, max_tokens=1
        )
    narrow = client.with_options(api_key=NARROW_KEY).chat.completions
    assert narrow.create(model="ask", messages=STATEMENT, max_tokens=2).choices
    with refused((openai.PermissionDeniedError, openai.NotFoundError)):  # type: ignore[arg-type]
        narrow.create(model="chat", messages=MESSAGES, max_tokens=2)


@check("errors: RateLimitError says when to come again")
def rate() -> None:
    limited = client.with_options(api_key=LIMITED_KEY).chat.completions
    with refused(openai.RateLimitError) as found:
        for _ in range(2):
            limited.create(model="base", messages=MESSAGES, max_tokens=1)
    assert 0 < float(found.error.response.headers["retry-after"]) <= 60


@check("x-ratelimit-* headers count down")
def rate_headers() -> None:
    left = []
    for _ in range(2):
        answer = client.chat.completions.with_raw_response.create(
            model="base", messages=MESSAGES, max_tokens=1
        )
        headers = answer.headers
        assert headers["x-ratelimit-limit-requests"] == "100000"
        assert int(headers["x-ratelimit-limit-tokens"]) == 100_000_000
        assert headers["x-ratelimit-reset-requests"] and headers["x-ratelimit-reset-tokens"]
        left.append(
            [int(headers[f"x-ratelimit-remaining-{what}"]) for what in ("requests", "tokens")]
        )
    assert left[1][0] < left[0][0] < 100_000 and left[1][1] < left[0][1], left


@check("embeddings are refused: NotFoundError")
def embeddings() -> None:
    with refused(openai.NotFoundError):
        client.embeddings.create(model="base", input="x")


@check("time-out: APITimeoutError, and the server stops working on it")
def timeout() -> None:
    options: Any = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with refused(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="chat", messages=MESSAGES, **options
        )
    wait_idle()


@check("cancel: a stream that is closed ends its request")
def cancel() -> None:
    begin = time.monotonic()
    stream = chat("chat", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_idle()
    assert time.monotonic() - begin < 5


@check("AsyncOpenAI: 16 at the same time answer as one alone; a cancelled task ends its request")
async def together() -> None:
    want = said(chat("chat"))
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as many:
        ask: Any = {"model": "chat", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
        answers = await asyncio.gather(*(many.chat.completions.create(**ask) for _ in range(16)))
        assert {said(answer) for answer in answers} == {want}
        long = many.chat.completions.create(
            **{**ask, "max_tokens": 400}, extra_body={"ignore_eos": True}
        )
        task = asyncio.create_task(long)
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
    await asyncio.to_thread(wait_idle)


@check("responses: whole, streamed, steered, usage")
def responses() -> None:
    ask: Any = {"model": "chat", "input": QUESTION, "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**ask, store=False)
    assert whole.output_text == said(chat("chat")) and whole.usage.output_tokens > 0
    events = list(client.responses.create(**ask, stream=True, store=False))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    by_body = client.responses.create(
        **{**ask, "model": "base"}, store=False, extra_body={"steering": STEERING}
    )
    assert by_body.output_text == whole.output_text
    turns: Any = [{"role": "user", "content": QUESTION}]
    answer = client.responses.create(**{**ask, "input": turns}, instructions="Answer.", store=False)
    assert answer.output_text


@check("responses: tool_choice named and required is honoured")
def responses_tools() -> None:
    tool: Any = {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}
    for choice in ({"type": "function", "name": "paint"}, "required"):
        answer = client.responses.create(
            model="base", input=QUESTION, tools=[tool], tool_choice=choice, store=False,
            parallel_tool_calls=False, max_output_tokens=ROOM, temperature=0,
        )  # fmt: skip
        (call, *_) = [item for item in answer.output if item.type == "function_call"]
        assert call.name == "paint" and is_right(json.loads(call.arguments))


@check("responses: a JSON schema in text.format")
def responses_schema() -> None:
    form = {"type": "json_schema", "name": "paint", "schema": SCHEMA, "strict": True}
    answer = client.responses.create(
        model="base", input=QUESTION, text={"format": form}, max_output_tokens=ROOM,
        temperature=0, store=False,
    )  # fmt: skip
    assert is_right(json.loads(answer.output_text))


@check("responses: previous_response_id is refused by name: nothing is stored")
def responses_previous() -> None:
    with refused(openai.BadRequestError, "previous_response_id", "stores no responses"):
        client.responses.create(
            model="base", input=QUESTION, previous_response_id="resp_of_nobody",
            max_output_tokens=4,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(check.run())
