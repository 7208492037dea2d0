"""Rounds of engine requests that belong together: all of them, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.requests.engine_request import EngineRequest, prepare
from server.requests.resolved import Report
from steering.plan import SteeringPlan

if TYPE_CHECKING:
    from server.requests.run import RequestEngine

T = TypeVar("T")

_KEPT = ("lora_request", "trace_headers", "priority", "data_parallel_rank")
"""Options of the request that hold for reading its replies too."""


async def together(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all at once; where one fails, or the client leaves, all have ended before it shows."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    """The last output of a request."""
    async with aclosing(outputs):
        return [output async for output in outputs][-1]


async def read(
    engine: RequestEngine,
    request: EngineRequest,
    plan: SteeringPlan,
    tag: str,
    replies: Sequence[Sequence[int]],
) -> Report:
    """What the worker measured at the end of each reply, by its index (as text).

    All replies are read at once. Where one cannot be, or the client leaves, all end.

    Args:
        engine: to run it.
        request: as it came.
        plan: from `SteeringPlan.reading`.
        tag: names the report, which the replies share: their indices are its choices.
        replies: token ids.
    """

    async def one(index: int, reply: Sequence[int]) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        options = {key: request.options[key] for key in _KEPT if key in request.options}
        # The worker takes the number in front for the choice, as in vLLM's own ids of choices.
        own = EngineRequest(request.prompt, params, f"{index}_{request.id}-{tag}", options)
        await last(engine.engine.submit(prepare(own, plan, tag, reply)))

    return await measured(engine, tag, together(one(*pair) for pair in enumerate(replies)),
                          dict.fromkeys(map(str, range(len(replies))), 1))  # fmt: skip


async def measured(
    engine: RequestEngine,
    tag: str,
    running: Coroutine[Any, Any, object],
    tokens: Mapping[str, int],
) -> Report:
    """The report of requests, once they have run; the worker forgets it in any case.

    Args:
        engine: which runs them.
        tag: names the report.
        running: ends when they have.
        tokens: choice → how many of its tokens count. It may be filled while they run.
    """
    try:
        await running
        reports = await engine.engine.report(tag, dict(tokens))
        if len(reports) < len(tokens):
            raise RuntimeError(f"the engine has measured {len(reports)} of {len(tokens)} replies")
        return reports
    except BaseException:
        engine.engine.forget(tag)
        raise


def passes(reports: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Forward passes by stream, over all of them."""
    found: dict[str, int] = {}
    for report in reports:
        for name, count in report["passes"].items():
            found[name] = found.get(name, 0) + count
    return found
