"""Fetches an adapter's files for a replica that may lose the work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from adapters.errors import AdapterError, FilesLost, RegistryAway
from adapters.registry.record import Content, Record
from adapters.registry.store import Store
from adapters.sources.fetch import Fetched, Fetcher
from adapters.sources.source import parse_source
from adapters.thread import in_thread

_PROGRESS_S = 1.0


class SupersededError(Exception):
    """Our work is not wanted any more: replaced, unloaded or taken over."""


def still(record: Record | None) -> Record:
    """The record after a change of ours.

    Raises:
        SupersededError: None, the work was not ours any more.
    """
    if record is None:
        raise SupersededError
    return record


class Fetching:
    """Fetches in threads, tells how far it is, and stops when the work is lost.

    What is copied from a disk does not wait for what comes over a network.

    Args:
        fetcher: gets files.
        store: where the progress is written.
        ours: whether some work is still ours, as far as this replica knows.
        downloads: from elsewhere, at the same time.
        copies: from local folders, at the same time.
    """

    def __init__(
        self, fetcher: Fetcher, store: Store, ours: Callable[[Record], bool], *,
        downloads: int, copies: int,
    ) -> None:  # fmt: skip
        self._fetcher, self._store, self._ours = fetcher, store, ours
        self._downloads, self._copies = asyncio.Semaphore(downloads), asyncio.Semaphore(copies)

    def turn(self, source: str) -> asyncio.Semaphore:
        """What a fetch from a source has to wait for."""
        local = parse_source(source).kind == "local"
        return self._copies if local else self._downloads

    async def fetch(self, source: str, job: Record | None = None) -> Fetched:
        """In a thread. Nobody waits for it when this is cancelled or the job is superseded: it ends
        at its next byte, and a source that sends none must not hold up the next load, or the exit.

        Args:
            source: where from.
            job: the job in progress.

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

    def stored(self, want: Content) -> Path | None:
        """A content's files if they are here, unread: they are when the engine needs them."""
        assert want.digest is not None
        return self._fetcher.store.folder(want.digest)

    async def folder(self, want: Content) -> Path:
        """A content's files, checked; fetched again where they are missing or were changed.

        Raises:
            AdapterError: they cannot be had.
        """
        assert want.digest is not None
        with contextlib.suppress(AdapterError):
            return await asyncio.to_thread(self._fetcher.store.verify, want.digest)
        async with self.turn(want.source):
            fetched = await self.fetch(want.source)
        if fetched.digest != want.digest:
            raise FilesLost(
                f"its files are not here, and {want.source} has other content now (digest "
                f"{fetched.digest[:12]}…, registered {want.digest[:12]}…)", field="source"
            )  # fmt: skip
        return fetched.folder

    async def _tell(self, job: Record, done: Callable[[], int]) -> None:
        """Tells how much is fetched; returns when the job is superseded."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            if not self._ours(job):
                return
            with contextlib.suppress(RegistryAway):
                await self._store.tell_progress(job.name, job.job, done())
