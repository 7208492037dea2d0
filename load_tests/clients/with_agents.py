"""The OpenAI Agents SDK, over chat completions and over the Responses API."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from pydantic import BaseModel

from load_tests.clients.asking import COLOURS, KEY, QUESTION, ROOM, STEERING, URL
from load_tests.clients.checks import Checks, refused

check = Checks("openai-agents", "openai-agents")
set_tracing_disabled(True)
SHAPES: tuple[Any, ...] = (OpenAIChatCompletionsModel, OpenAIResponsesModel)


class Paint(BaseModel):
    """A colour, and whether it is sure."""

    colour: Literal["red", "green", "blue"]
    sure: bool


def paint(colour: Literal["red", "green", "blue"], sure: bool) -> str:
    """Paints it."""
    return f"{colour} {sure}"


PAINT: Any = function_tool(paint)


def agent(shape: Any, model: str = "base", settings: Any = None, **more: Any) -> Any:
    """An agent of the SDK; a client for each, because each run has an event loop of its own."""
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=50)
    found = ModelSettings(temperature=0, max_tokens=24).resolve(settings)
    more = {"instructions": "You answer questions.", **more}
    return Agent(
        name="A", model=shape(model=model, openai_client=client), model_settings=found, **more
    )


def forced(choice: str) -> Any:
    """Settings with which the model calls a tool, and one only."""
    return ModelSettings(tool_choice=choice, parallel_tool_calls=False, max_tokens=ROOM)


@check("an answer: chat and Responses agree; a profile as the model, and by extra_body")
async def answers() -> None:
    texts = []
    for shape in SHAPES:
        result = await Runner.run(agent(shape, "chat"), QUESTION)
        assert result.raw_responses[0].usage.output_tokens > 0
        steered = agent(shape, settings=ModelSettings(extra_body={"steering": STEERING}))
        assert (await Runner.run(steered, QUESTION)).final_output == result.final_output
        texts.append(result.final_output)
    assert texts[0] == texts[1] != (await Runner.run(agent(SHAPES[0]), QUESTION)).final_output


@check("streamed: the deltas are the answer")
async def streamed() -> None:
    for shape in SHAPES:
        result = Runner.run_streamed(agent(shape, "chat"), QUESTION)
        text = ""
        async for event in result.stream_events():
            data: Any = getattr(event, "data", None)
            if getattr(data, "type", "") == "response.output_text.delta":
                text += data.delta
        assert text == result.final_output != "", shape


@check("tools, required: the function is called with what its schema allows")
async def tools() -> None:
    for shape in SHAPES:
        settings = forced("required")
        one = agent(shape, settings=settings, tools=[PAINT], tool_use_behavior="stop_on_first_tool")
        result = await Runner.run(one, QUESTION)
        colour, sure = str(result.final_output).split()
        assert colour in COLOURS and sure in ("True", "False"), shape


@check("tools, auto, and the tool's result going back to the model")
async def tools_back() -> None:
    for shape in SHAPES:
        assert (await Runner.run(agent(shape, "chat", tools=[PAINT]), QUESTION)).final_output
        # After the first call the SDK leaves the choice to the model, which answers in words.
        settings = forced("paint")
        result = await Runner.run(agent(shape, settings=settings, tools=[PAINT]), QUESTION)
        kinds = [item.type for item in result.new_items]
        assert "tool_call_item" in kinds and "tool_call_output_item" in kinds, shape
        assert result.final_output, shape


@check("output_type: a Pydantic class, by JSON schema")
async def structured() -> None:
    for shape in SHAPES:
        settings = ModelSettings(max_tokens=ROOM)
        result = await Runner.run(agent(shape, settings=settings, output_type=Paint), QUESTION)
        assert isinstance(result.final_output, Paint), shape


@check("handoff: one agent gives over to another")
async def handoffs() -> None:
    for shape in SHAPES:
        other = agent(shape, "chat", handoff_description="Knows pets.")
        other.name = "B"
        settings = forced("required")
        first = agent(shape, settings=settings, handoffs=[handoff(other)])
        result = await Runner.run(first, QUESTION)
        assert result.last_agent.name == "B" and result.final_output, shape


@check("a session keeps the turns")
async def sessions() -> None:
    for shape in SHAPES:
        session = SQLiteSession("one")
        one = agent(shape, "chat")
        await Runner.run(one, QUESTION, session=session)
        second = await Runner.run(one, QUESTION, session=session)
        assert second.final_output and len(await session.get_items()) == 4, shape
        json.dumps(second.to_input_list())


@check("errors: the openai package's classes pass through")
async def errors() -> None:
    for shape in SHAPES:
        settings = ModelSettings(extra_body={"steering": {**STEERING, "strength": 1000}})
        with refused(openai.BadRequestError, "strength"):
            await Runner.run(agent(shape, settings=settings), QUESTION)
        with refused(openai.NotFoundError, "nobody"):
            await Runner.run(agent(shape, "nobody"), QUESTION)


if __name__ == "__main__":
    sys.exit(check.run())
