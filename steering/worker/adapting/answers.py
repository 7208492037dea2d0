"""The outcome of a call into the worker: a result, or an error as plain data."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import torch

from adapters.errors import AdapterError, FilesLost, NoRoom, ServerFault, to_wire

logger = logging.getLogger(__name__)

Answer = dict[str, Any]
"""`{"done": result}`, or `{"error": …}` as `adapters.errors.from_wire` reads it."""

_NO_MEMORY = "can't allocate memory"
"""What torch says on CPUs, in a plain RuntimeError."""


def answer(work: Callable[[], Any]) -> Answer:
    """The answer to a call whose errors are those of adapters.

    Args:
        work: gives the result, plain data.
    """
    try:
        return {"done": work()}
    except Exception as error:
        fault = _fault(error)
        if fault is not error:
            logger.exception("a call into the worker failed")
        return {"error": to_wire(fault)}


def _fault(error: Exception) -> AdapterError:
    """An error as one of ours: what the artefact cannot be blamed for is the server's fault."""
    if isinstance(error, AdapterError):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY in str(error):
        return NoRoom("the engine has no memory for it")
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return NoRoom("the engine has no memory for it")
        return FilesLost(f"the engine cannot read the files: {error}")
    return ServerFault(f"the engine failed: {type(error).__name__}: {error}")
