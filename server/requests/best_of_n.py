"""Best of n: several replies are drawn, a head reads each to its end, the best is the answer.

Two rounds through the engine: one request with n choices, then a request per reply whose prompt
is prompt and reply, which runs the head's stream alone and reports its number.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, SamplingType

from server.requests.engine_request import EngineRequest, prepare
from server.requests.resolved import Report
from steering.errors import BadValue
from steering.kernels.reference import best_reply
from steering.plan import SteeringPlan
from steering.prompts import align

if TYPE_CHECKING:
    from server.requests.run import RequestEngine

_KEPT = ("lora_request", "trace_headers", "priority", "data_parallel_rank")
"""Options of the request that hold for reading its replies too."""


def start(
    engine: RequestEngine, request: EngineRequest, index: int
) -> AsyncGenerator[RequestOutput, None]:
    """Runs one prompt under a plan with `best`; gives one output, when the reply is chosen.

    A plain function: what is wrong is raised here, before a response has begun.

    Args:
        engine: to run it; gets the report.
        request: as it came.
        index: which of the HTTP request's prompts.

    Raises:
        BadValue: greedy decoding, which draws the same reply every time, or a prompt that leaves
            no room. One token of the context is kept free: the engine reads a prompt only if it
            may draw a token behind it.
    """
    plan = engine.resolved.plan_of(index)
    assert plan.best is not None
    params: SamplingParams = request.params.clone()
    if plan.best.n > 1 and params.sampling_type == SamplingType.GREEDY:
        raise BadValue("greedy decoding draws the same reply every time; best_of_n needs several",
                       field="temperature", value=params.temperature, allowed="> 0")  # fmt: skip
    padded, pad = align(request.prompt_ids, plan)
    engine.fit(params, len(padded), pad, engine.engine.model_config.max_model_len - 1)
    params.n, params.output_kind = plan.best.n, RequestOutputKind.FINAL_ONLY
    measured: dict[int, Report] = {}
    outputs = engine.run(replace(request, params=params), plan.drawing, index, measured)
    return _run(engine, request, outputs, measured, index)


async def _run(
    engine: RequestEngine,
    request: EngineRequest,
    outputs: AsyncGenerator[RequestOutput, None],
    measured: dict[int, Report],
    index: int,
) -> AsyncGenerator[RequestOutput, None]:
    """Draws, reads, chooses.

    Args:
        engine: to run it; gets the report.
        request: as it came.
        outputs: of the drawing.
        measured: gets the drawing's report, if one is wanted, under `index`.
        index: which of the HTTP request's prompts.
    """
    resolved = engine.resolved
    plan = resolved.plan_of(index)
    async with aclosing(outputs):
        drawn = [output async for output in outputs][-1]
    replies = [list(choice.token_ids) for choice in drawn.outputs]
    read = await _read(engine, request, plan.scoring, f"{resolved.tag}-{index}-value", replies)
    assert plan.best is not None
    values = [read[str(i)]["heads"][plan.best.head] for i in range(len(replies))]
    best = best_reply(values)
    drawings = measured.get(index, {})
    if str(best) in drawings:
        resolved.reports[index] = {
            "0": {
                **drawings[str(best)],
                "passes": _passes([*drawings.values(), *read.values()]),
                "values": values,
                "chosen": best,
                "generated_tokens": sum(map(len, replies)),
            }
        }
    chosen = drawn.outputs[best]
    chosen.index = 0
    drawn.outputs = [chosen]
    yield drawn


async def _read(
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
        plan: from `SteeringPlan.scoring`.
        tag: names the report, which the replies share: their indices are its choices.
        replies: token ids.
    """

    async def read(index: int, reply: Sequence[int]) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        options = {key: request.options[key] for key in _KEPT if key in request.options}
        # The worker takes the number in front for the choice, as in vLLM's own ids of choices.
        engine_request = EngineRequest(request.prompt, params, f"{index}_{request.id}", options)
        outputs = engine.engine.submit(prepare(engine_request, plan, tag, reply))
        async with aclosing(outputs):
            async for _ in outputs:
                pass

    reading = [asyncio.create_task(read(*pair)) for pair in enumerate(replies)]
    try:
        await asyncio.gather(*reading)
        reports = await engine.engine.report(tag, {})
        if len(reports) < len(replies):
            raise RuntimeError(f"the engine has read {len(reports)} of {len(replies)} replies")
        return reports
    except BaseException:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        engine.engine.forget(tag)
        raise


def _passes(reports: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Forward passes by stream, over all of them."""
    names = dict.fromkeys(name for report in reports for name in report["passes"])
    return {name: sum(r["passes"].get(name, 0) for r in reports) for name in names}
