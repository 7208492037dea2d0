"""Best of n: several replies are drawn, a head reads each to its end, the best is the answer.

Two rounds through the engine: one request with n choices, then a request per reply whose prompt
is prompt and reply, which runs the head's stream alone and reports its number.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, SamplingType

from server.requests.engine_request import EngineRequest
from server.requests.resolved import Report
from server.requests.rounds import last, passes, read
from steering.errors import BadValue
from steering.kernels.reference import best_reply
from steering.prompts import align

if TYPE_CHECKING:
    from server.requests.run import RequestEngine


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
    drawn = await last(outputs)
    replies = [list(choice.token_ids) for choice in drawn.outputs]
    heard = await read(engine, request, plan.scoring, f"{resolved.tag}-{index}-value", replies)
    assert plan.best is not None
    values = [heard[str(i)]["heads"][plan.best.head] for i in range(len(replies))]
    best = best_reply(values)
    drawings = measured.get(index, {})
    if str(best) in drawings:
        resolved.reports[index] = {
            "0": {
                **drawings[str(best)],
                "passes": passes([*drawings.values(), *heard.values()]),
                "values": values,
                "chosen": best,
                "generated_tokens": sum(map(len, replies)),
            }
        }
    chosen = drawn.outputs[best]
    chosen.index = 0
    drawn.outputs = [chosen]
    yield drawn
