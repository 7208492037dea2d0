"""LangChain: `ChatOpenAI`, `OpenAI` and `OpenAIEmbeddings` of langchain-openai."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, SecretStr

from load_tests.clients.asking import (
    KEY,
    LIMITED_KEY,
    PROMPT,
    QUESTION,
    ROOM,
    STATEMENT,
    STEERING,
    URL,
    cut,
    stops,
)
from load_tests.clients.checks import Checks, refused

check = Checks("langchain-openai", "langchain-openai")


class Paint(BaseModel):
    """A colour, and whether it is sure."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    sure: bool


def llm(model: str = "base", key: str = KEY, **more: Any) -> Any:
    """A chat model of LangChain's."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "max_retries": 0, **more}
    return ChatOpenAI(model=model, base_url=f"{URL}/v1", api_key=SecretStr(key), **options)


@check("chat: invoke, stream, batch, usage; a profile as the model")
def chat() -> None:
    one = llm("chat")
    whole = one.invoke(QUESTION)
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(c.content) for c in one.stream(QUESTION)) == whole.content
    texts = [message.content for message in one.batch([QUESTION] * 4)]
    assert texts == [whole.content] * 4


@check("chat: a chain with a system message and several turns")
def turns() -> None:
    chain = ChatPromptTemplate.from_messages(
        [("system", "You answer questions."), ("human", "{question}")]
    ) | llm("chat")
    first = chain.invoke({"question": QUESTION})
    messages = [SystemMessage("You answer."), HumanMessage(QUESTION), AIMessage(first.content),
                HumanMessage(QUESTION)]  # fmt: skip
    assert llm("chat").invoke(messages).content


@check("steering and adapters by extra_body")
def steering() -> None:
    want = llm("chat").invoke(QUESTION).content
    assert llm(extra_body={"steering": STEERING}).invoke(QUESTION).content == want
    assert llm().invoke(QUESTION).content != want
    text = STATEMENT[0]["content"]
    asked = llm("ask").invoke(text).content
    assert llm(extra_body={"adapters": [{"name": "ask"}]}).invoke(text).content == asked
    assert llm().invoke(text).content != asked


@check("chat: log-probabilities; n=2 by generate")
def logprobs() -> None:
    found = llm(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]
    assert all(len(token["top_logprobs"]) == 2 for token in found["content"])
    many = llm(n=2, temperature=1).generate([[HumanMessage(QUESTION)]])
    assert len(many.generations[0]) == 2


@check("tools: bind_tools with tool_choice any, a name, auto; the result back")
def tools() -> None:
    tool = StructuredTool.from_function(
        func=lambda colour, sure: f"{colour} {sure}", name="paint", description="Paints.",
        args_schema=Paint,
    )  # fmt: skip
    for choice in ("any", "paint"):
        bound = llm(max_tokens=ROOM).bind_tools(
            [tool], tool_choice=choice, strict=True, parallel_tool_calls=False
        )
        message = bound.invoke(QUESTION)
        call = message.tool_calls[0]
        assert call["name"] == "paint" and Paint(**call["args"])
    pieces = None
    for chunk in bound.stream(QUESTION):
        pieces = chunk if pieces is None else pieces + chunk
    assert pieces is not None and Paint(**pieces.tool_calls[0]["args"])
    result = ToolMessage(tool.invoke(call["args"]), tool_call_id=call["id"])
    back = [HumanMessage(QUESTION), message, result]
    assert llm("chat").bind_tools([tool], strict=True).invoke(back).content


@check("with_structured_output: json_schema and function_calling")
def structured() -> None:
    for method in ("json_schema", "function_calling"):
        model = llm(max_tokens=ROOM).with_structured_output(Paint, method=method, strict=True)
        assert isinstance(model.invoke(QUESTION), Paint), method


@check("stop lists of 5 and 16 strings; fields that nobody knows are ignored")
def unknown() -> None:
    want = llm("chat").invoke(QUESTION).content
    word, before = cut(want)
    for count in (5, 16):
        assert llm("chat").invoke(QUESTION, stop=stops(word, count)).content == before, count
    odd = llm("chat", extra_body={"surprise": 1, "chat_template_kwargs": {}}, metadata={"a": "b"})
    assert odd.invoke(QUESTION).content == want


@check("completions: OpenAI invoke and stream")
def completions() -> None:
    text = OpenAI(
        model="base", base_url=f"{URL}/v1", api_key=SecretStr(KEY), temperature=0, max_tokens=6,
        max_retries=0,
    )  # fmt: skip
    whole = text.invoke(PROMPT)
    assert whole and "".join(text.stream(PROMPT)) == whole


@check("responses: use_responses_api, whole and streamed")
def responses() -> None:
    model = llm("chat", use_responses_api=True)
    whole = model.invoke(QUESTION)
    assert whole.text == llm("chat").invoke(QUESTION).content
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == whole.text


@check("asynchronous: ainvoke, astream, abatch")
async def together() -> None:
    model = llm("chat")
    whole = await model.ainvoke(QUESTION)
    many = await asyncio.gather(*(model.ainvoke(QUESTION) for _ in range(8)))
    assert {message.content for message in many} == {whole.content}
    assert "".join([str(c.content) async for c in model.astream(QUESTION)]) == whole.content


@check("errors: the openai package's classes pass through")
def errors() -> None:
    with refused(openai.BadRequestError, "strength"):
        llm(extra_body={"steering": {**STEERING, "strength": 1000}}).invoke(QUESTION)
    with refused(openai.NotFoundError, "nobody"):
        llm("nobody").invoke(QUESTION)
    with refused(openai.AuthenticationError):
        llm(key="wrong").invoke(QUESTION)
    with refused(openai.RateLimitError):
        llm(key=LIMITED_KEY).batch([QUESTION, QUESTION])
    with refused(openai.APITimeoutError):
        llm("chat", timeout=0.3, max_tokens=400, extra_body={"ignore_eos": True}).invoke(QUESTION)


@check("embeddings are refused: NotFoundError")
def embeddings() -> None:
    model = OpenAIEmbeddings(
        model="base", base_url=f"{URL}/v1", api_key=SecretStr(KEY), max_retries=0,
        check_embedding_ctx_length=False,
    )  # fmt: skip
    with refused(openai.NotFoundError):
        model.embed_query("x")


if __name__ == "__main__":
    sys.exit(check.run())
