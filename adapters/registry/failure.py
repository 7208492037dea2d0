"""Why a replica could not load an adapter."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from adapters.errors import AdapterError, ServerFault

logger = logging.getLogger("coxswain")


@dataclass(frozen=True)
class Failure:
    """Why this replica could not load what a record says is serving.

    Args:
        key: of that content; another one is tried at once.
        error: why.
        again_s: `time.monotonic()` at which to try again anyway; None: never.
    """

    key: tuple[str, str | None]
    error: AdapterError
    again_s: float | None


def fault_of(name: str, error: Exception) -> AdapterError:
    """The cause of a failed load. Unexpected errors are not the artefact's fault."""
    if isinstance(error, AdapterError):
        return error
    logger.error("adapter %s: unexpected", name, exc_info=error)
    return ServerFault(f"internal error: {error!r}")


def log_unexpected(name: str, task: asyncio.Task[None]) -> None:
    """Logs an unexpected error that ended a task."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("adapter %s: unexpected", name, exc_info=error)
