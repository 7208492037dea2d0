"""Who caused an error, as exceptions that both vLLM's serving classes and our routes know.

Until the engine has a request, what vLLM raises says that it could not read it (`reading`). What
our own code raises without meaning to is never the caller's fault (`ours`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from types import MappingProxyType
from typing import NoReturn, TypeVar

import jinja2
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GenerationError, VLLMError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from adapters.errors import AdapterError, Fault
from server import errors
from server.errors import HttpError
from steering import broken
from steering.errors import SteeringError

logger = logging.getLogger("coxswain")
T = TypeVar("T")

INTERNAL = "Internal error; the server's log has the details."

MEANT = (HttpError, Fault, VLLMError, EngineDeadError, EngineGenerateError)
"""Errors that say whose fault they are."""

_MISSING = (AttributeError, LookupError)
_BAD_VALUE = (ValueError, TypeError, OverflowError, NotImplementedError, jinja2.TemplateError)
"""What vLLM's reading of a request raises for bad values that it has no class of its own for."""


def http_error(error: Exception, fields: Mapping[str, str] = MappingProxyType({})) -> HttpError:
    """Any error as the answer that the client gets; what nobody meant to raise is logged.

    Args:
        error: what ended the request.
        fields: vLLM's names of the request's fields → its own.
    """
    return errors.in_the_request_s_words(_http_error(error), fields)


def _http_error(error: Exception) -> HttpError:
    if isinstance(error, HttpError):
        return error
    if isinstance(error, SteeringError):
        return errors.from_steering(error)
    if isinstance(error, AdapterError):
        return errors.from_adapters(error)
    if isinstance(error, EngineDeadError):
        return HttpError(503, "The engine has died; the server is ending.", code="dead",
                         retry_after_s=5)  # fmt: skip
    if isinstance(error, EngineGenerateError):
        logger.error("the engine could not finish a request", exc_info=error)
        return HttpError(500, "The engine could not finish this request.")
    if isinstance(error, VLLMError):
        return errors.from_vllm(create_error_response(error).error.model_dump())
    logger.error("a request failed", exc_info=error)
    return HttpError(500, INTERNAL)


@contextmanager
def reading(taken: Callable[[], bool]) -> Iterator[None]:
    """Around vLLM's reading of a request: what it trips over, the request has brought.

    Args:
        taken: whether the engine has the request, from when on nothing is the caller's fault.

    Raises:
        HttpError: 400, or 501 for what vLLM cannot do.
    """
    try:
        yield
    except MEANT:
        raise
    except (*_MISSING, *_BAD_VALUE) as error:
        if taken():
            raise
        logger.debug("a request that vLLM cannot read", exc_info=error)
        if isinstance(error, _MISSING):
            raise HttpError(400, "A part of the request is empty, missing or of the wrong "
                            f"type: {error}") from error  # fmt: skip
        raise errors.from_vllm(create_error_response(error).error.model_dump()) from error


@contextmanager
def ours() -> Iterator[None]:
    """Around code of ours that vLLM calls: its bugs are the server's, and are logged.

    Raises:
        GenerationError: for what the code did not mean to raise; status 500.
    """
    try:
        yield
    except MEANT:
        raise
    except Exception as error:
        raise GenerationError(http_error(error).message) from error


async def reading_in(
    events: AsyncGenerator[T, None], taken: Callable[[], bool]
) -> AsyncGenerator[T, None]:
    """Passes the events of a stream on, as `reading`."""
    with reading(taken):
        async with aclosing(events):
            async for event in events:
                yield event


async def ours_in(
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on, as `ours`."""
    with ours():
        async with aclosing(outputs):
            async for output in outputs:
                yield output


async def raised(
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on; raises the error with which the engine ends a request.

    vLLM's serving classes answer an engine's error with "Internal server error". Both exceptions
    are ones that they know, also inside a stream.

    Raises:
        GenerationError: a stream gave no numbers; status 500.
        VLLMValidationError: the engine does not take the request, or its constraints cannot be
            met; status 400.
    """
    begun = False
    try:
        async with aclosing(outputs):
            async for output in outputs:
                begun = True
                for choice in output.outputs:
                    if choice.finish_reason == "error" and isinstance(choice.stop_reason, str):
                        raise _error(choice.stop_reason)
                yield output
    except ValueError as error:  # vLLM's `process_inputs` has them, beside classes of its own
        if begun:
            raise
        raise VLLMValidationError(str(error)) from error


def raise_again(error: Exception | str, *_: object, **__: object) -> NoReturn:
    """In the place of vLLM's ways to write an error into a stream: the stream ends with it, and
    `server.routes.sse` writes it. What is not raised would look like a stream that went well.

    Raises:
        Exception: the error.
    """
    raise GenerationError(error) if isinstance(error, str) else error


def _error(reason: str) -> VLLMError:
    field = broken.fault_of_caller(reason)
    if field is None:
        return GenerationError(reason)
    return VLLMValidationError(reason, parameter=field or None)
