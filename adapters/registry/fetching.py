"""Fetches an adapter's files for a replica that may lose the work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from adapters.errors import RegistryAway
from adapters.registry.record import Record
from adapters.registry.registry import Registry
from adapters.sources.fetch import Fetched, Fetcher
from adapters.sources.source import parse_source
from adapters.thread import in_thread

_PROGRESS_S = 1.0


class SupersededError(Exception):
    """Our work is not wanted any more: replaced, unloaded or taken over."""


class Fetching:
    """Fetches in a thread, tells the registry how far it is, and stops when the work is lost.

    Args:
        fetcher: gets files.
        registry: where the progress is told.
    """

    def __init__(self, fetcher: Fetcher, registry: Registry) -> None:
        self._fetcher, self._registry = fetcher, registry

    async def fetch(self, source: str, job: Record | None = None) -> Fetched:
        """In a thread. Nobody waits for it when this is cancelled or the job is superseded: it ends
        at its next byte, and a source that sends none must not hold up the next load, or the exit.

        Args:
            source: where from.
            job: whose progress is told to the registry.

        Raises:
            SupersededError: the job is not ours any more.
            AdapterError: the files cannot be had.
        """
        done = 0
        over = False

        def report(count: int) -> None:
            nonlocal done
            done = count
            if over:
                raise SupersededError

        fetching = asyncio.create_task(
            in_thread(lambda: self._fetcher.fetch(parse_source(source), report))
        )
        telling = asyncio.create_task(self._tell(job, lambda: done)) if job else None
        try:
            await asyncio.wait(
                {fetching, telling} if telling else {fetching},
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not fetching.done():
                raise SupersededError
            return fetching.result()
        finally:
            over = True
            fetching.cancel()
            if telling is not None:
                telling.cancel()

    async def _tell(self, job: Record, done: Callable[[], int]) -> None:
        """Tells the registry how much is fetched; returns when the job is superseded."""
        said = 0
        while True:
            await asyncio.sleep(_PROGRESS_S)
            now = done()
            with contextlib.suppress(RegistryAway):
                if now == said:
                    ours = await self._registry.holds(job)
                else:
                    ours = await self._registry.progress(job, said := now) is not None
                if not ours:
                    return
