"""Counts the tokens of a request as the engine gives them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.context import RequestContext


async def counted(
    outputs: AsyncGenerator[RequestOutput, None],
    context: RequestContext,
    params: SamplingParams,
    *,
    again: bool = False,
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on and counts their tokens, also those of a request that is broken off.

    Args:
        outputs: of one engine request.
        context: of the HTTP request.
        params: of the engine request.
        again: the prompt has been counted, with another engine request of the HTTP request.
    """
    delta = params.output_kind == RequestOutputKind.DELTA
    before: dict[int, int] = {}
    first = True
    async with aclosing(outputs):
        async for output in outputs:
            if first and not again:
                context.prompt_tokens += len(output.prompt_token_ids or ())
            first = False
            for choice in output.outputs:
                drawn = len(choice.token_ids)
                # Each output of a stream holds what is new; other outputs hold everything.
                context.count_drawn(drawn if delta else drawn - before.get(choice.index, 0))
                before[choice.index] = drawn
            yield output
