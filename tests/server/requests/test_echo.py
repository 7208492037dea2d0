"""Each choice of a stream begins with the prompt's log-probabilities, also behind vLLM's queue."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.output_processor import RequestOutputCollector

from server.requests.echo import echoed

PROMPT: list[Any] = [None, {134: Logprob(-1.0)}]


def output(index: int, token: int, prompt: list[Any]) -> RequestOutput:
    """What a step gives one choice of a stream; only its first has the prompt's."""
    choice = CompletionOutput(index, "x", [token], 0.0, [{token: Logprob(-2.0)}])
    return RequestOutput("r", "p", [7, 134], prompt, [choice], finished=False)


async def through_the_queue(slow: bool) -> AsyncGenerator[RequestOutput, None]:
    """VLLM's own queue between engine and client, both choices drawing at each step."""
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    steps = [[output(0, 5, PROMPT)], [output(0, 6, []), output(1, 5, PROMPT)], [output(1, 6, [])]]
    for step in steps:
        for one in step:
            queue.put(one)
            if not slow:
                yield await queue.get()
        if slow:
            yield await queue.get()


def params(**more: Any) -> SamplingParams:
    kind = {"output_kind": RequestOutputKind.DELTA}
    return SamplingParams(**{"n": 2, "prompt_logprobs": 0, **kind, **more})


async def prompts(slow: bool, asked: SamplingParams) -> dict[int, Any]:
    """The prompt's log-probabilities that came with each choice's first output."""
    found: dict[int, Any] = {}
    async for one in echoed(through_the_queue(slow), asked):
        for choice in one.outputs:
            found.setdefault(choice.index, one.prompt_logprobs)
    return found


async def test_a_fast_client_gets_them_with_each_choice() -> None:
    assert await prompts(False, params()) == {0: PROMPT, 1: PROMPT}


async def test_a_slow_client_too() -> None:
    assert await prompts(True, params()) == {0: PROMPT, 1: PROMPT}


async def test_vllm_s_queue_loses_them() -> None:
    """Else this module can go."""
    outputs = [one async for one in through_the_queue(slow=True)]
    assert [choice.index for choice in outputs[1].outputs] == [0, 1]
    assert outputs[1].prompt_logprobs == []
