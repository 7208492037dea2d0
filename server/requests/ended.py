"""Errors with which the engine ends a request, as exceptions that name what was wrong."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from vllm.exceptions import GenerationError, VLLMError, VLLMValidationError
from vllm.outputs import RequestOutput

from steering import broken


async def sound(
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on.

    vLLM's serving classes answer an engine's error with "Internal server error". Both exceptions
    are ones that they know, also inside a stream.

    Raises:
        GenerationError: a stream gave no numbers; status 500.
        VLLMValidationError: the request's constraints cannot be met; status 400.
    """
    async with aclosing(outputs):
        async for output in outputs:
            for choice in output.outputs:
                if choice.finish_reason == "error" and isinstance(choice.stop_reason, str):
                    raise _error(choice.stop_reason)
            yield output


def _error(reason: str) -> VLLMError:
    field = broken.fault_of_caller(reason)
    if field is None:
        return GenerationError(reason)
    return VLLMValidationError(reason, parameter=field or None)
