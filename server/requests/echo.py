"""The prompt's log-probabilities for every choice of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams


def echoed(
    outputs: AsyncGenerator[RequestOutput, None], params: SamplingParams
) -> AsyncGenerator[RequestOutput, None]:
    """The same outputs, each that begins a choice with the prompt's log-probabilities.

    Of a stream with several choices each begins with an output that has them. Where the client is
    slower than the engine, vLLM 0.32 puts such an output together with an earlier one that has
    none, loses them, and its `echo` of the choice ends the stream with an error.
    """
    if (
        params.n == 1
        or params.prompt_logprobs is None
        or params.output_kind != RequestOutputKind.DELTA
    ):
        return outputs
    return _echoed(outputs)


async def _echoed(
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    prompt_logprobs = None
    begun: set[int] = set()
    async with aclosing(outputs):
        async for output in outputs:
            prompt_logprobs = prompt_logprobs or output.prompt_logprobs
            new = {choice.index for choice in output.outputs} - begun
            if new and not output.prompt_logprobs:
                output.prompt_logprobs = prompt_logprobs
            begun |= new
            yield output
