"""Best of n: several replies are drawn, a head reads each to its end, the best is the answer.

Two rounds through the engine: one request with n choices, then a request per reply whose prompt
is prompt and reply, which runs the head's stream alone and reports its number.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, SamplingType

from server.requests.boarding import Ride, board, limit_tokens, prompt_ids
from server.requests.steered import Report, Steered
from steering.errors import BadValue
from steering.kernels.reference import best_reply
from steering.plan import SteeringPlan
from steering.prompts import align

_KEPT = ("lora_request", "trace_headers", "priority", "data_parallel_rank")
"""Options of the request that hold for reading its replies too."""


class Engine(Protocol):
    """What of `SteeredLLM` is needed here."""

    model_config: Any

    def ride(
        self,
        ride: Ride,
        plan: SteeringPlan,
        steered: Steered,
        index: int,
        reports: dict[int, Report],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs one prompt under a plan."""
        ...

    def submit(self, ride: Ride) -> AsyncGenerator[RequestOutput, None]:
        """Runs a request that has boarded."""
        ...

    async def report(self, tag: str, drawn: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
        """What the worker measured."""
        ...

    def forget(self, tag: str) -> None:
        """Drops a report."""
        ...


def start(
    engine: Engine, ride: Ride, steered: Steered, index: int
) -> AsyncGenerator[RequestOutput, None]:
    """Runs one prompt under a plan with `best`; gives one output, when the reply is chosen.

    A plain function: what is wrong is raised here, before a response has begun.

    Args:
        engine: to run it.
        ride: the request as it came.
        steered: the HTTP request that it belongs to; gets the report.
        index: which of its prompts.

    Raises:
        BadValue: greedy decoding, which draws the same reply every time, or a prompt that leaves
            no room. One token of the context is kept free: the engine reads a prompt only if it
            may draw a token behind it.
    """
    plan = steered.plan_of(index)
    assert plan.best is not None
    params: SamplingParams = ride.params.clone()
    if plan.best.n > 1 and params.sampling_type == SamplingType.GREEDY:
        raise BadValue("greedy decoding draws the same reply every time; best_of_n needs several",
                       field="temperature", value=params.temperature, allowed="> 0")  # fmt: skip
    padded, pad = align(prompt_ids(ride.prompt), plan)
    limit_tokens(
        params, steered.max_tokens, len(padded), pad, engine.model_config.max_model_len - 1
    )
    params.n, params.output_kind = plan.best.n, RequestOutputKind.FINAL_ONLY
    measured: dict[int, Report] = {}
    drawing = replace(ride, params=params)
    outputs = engine.ride(drawing, plan.drawing, steered, index, measured)
    return _run(engine, ride, outputs, measured, steered, index)


async def _run(
    engine: Engine,
    ride: Ride,
    outputs: AsyncGenerator[RequestOutput, None],
    measured: dict[int, Report],
    steered: Steered,
    index: int,
) -> AsyncGenerator[RequestOutput, None]:
    """Draws, reads, chooses.

    Args:
        engine: to run it.
        ride: the request as it came.
        outputs: of the drawing.
        measured: gets the drawing's report, if one is wanted, under `index`.
        steered: gets the request's report.
        index: which of its prompts.
    """
    plan = steered.plan_of(index)
    async with aclosing(outputs):
        drawn = [output async for output in outputs][-1]
    replies = [list(choice.token_ids) for choice in drawn.outputs]
    read = await _read(engine, ride, plan.scoring, f"{steered.tag}-{index}-value", replies)
    assert plan.best is not None
    values = [read[str(i)]["heads"][plan.best.head] for i in range(len(replies))]
    best = best_reply(values)
    drawings = measured.get(index, {})
    if str(best) in drawings:
        steered.reports[index] = {
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
    engine: Engine,
    ride: Ride,
    plan: SteeringPlan,
    tag: str,
    replies: Sequence[Sequence[int]],
) -> Report:
    """What the worker measured at the end of each reply, by its index (as text).

    All replies are read at once. Where one cannot be, or the client leaves, all end.

    Args:
        engine: to run it.
        ride: the request as it came.
        plan: from `SteeringPlan.scoring`.
        tag: names the report, which the replies share: their indices are its choices.
        replies: token ids.
    """

    async def read(index: int, reply: Sequence[int]) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt, _ = board(ride.prompt, params, plan, tag, reply)
        options = {key: ride.options[key] for key in _KEPT if key in ride.options}
        # The worker takes the number in front for the choice, as in vLLM's own ids of choices.
        outputs = engine.submit(Ride(prompt, params, f"{index}_{ride.request_id}", options))
        async with aclosing(outputs):
            async for _ in outputs:
                pass

    reading = [asyncio.create_task(read(*pair)) for pair in enumerate(replies)]
    try:
        await asyncio.gather(*reading)
        found = await engine.report(tag, {})
        if len(found) < len(replies):
            raise RuntimeError(f"the engine has read {len(found)} of {len(replies)} replies")
        return found
    except BaseException:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        engine.forget(tag)
        raise


def _passes(reports: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Forward passes by stream, over all of them."""
    names = dict.fromkeys(name for report in reports for name in report["passes"])
    return {name: sum(r["passes"].get(name, 0) for r in reports) for name in names}
