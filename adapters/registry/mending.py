"""Stored files that were changed or are gone while their adapter answers: fetched again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from adapters.errors import AdapterError, FilesLost
from adapters.registry.record import Content
from adapters.sources.store import ContentStore

logger = logging.getLogger("coxswain")

AGAIN_S = 5.0
"""How long a source that could not help is left alone."""


class Mender:
    """One per replica, on its event loop.

    Args:
        store: the files.
        named: what answers here with some digest; its names may come from several sources.
        fetched: a content's files, in the store with the right digest; raises AdapterError.
    """

    def __init__(
        self,
        store: ContentStore,
        named: Callable[[str], Iterable[Content]],
        fetched: Callable[[Content], Awaitable[Path]],
    ) -> None:
        self._store, self._named, self._fetched = store, named, fetched
        self._one_at_a_time = asyncio.Lock()
        self._lost: dict[str, tuple[str, float]] = {}  # digest → why, and when to try again

    def lost(self, digest: str | None) -> str | None:
        """Why the files of a digest cannot be had; None: nobody has missed them."""
        return self._lost[digest][0] if digest in self._lost else None

    async def mend(self, digest: str) -> None:
        """Returns once the files of a digest have been read and are what it says.

        Raises:
            FilesLost: they are not, and cannot be fetched again.
        """
        if not await self._whole(digest):
            async with self._one_at_a_time:
                await self._mend(digest)
        self._lost.pop(digest, None)

    async def _whole(self, digest: str) -> bool:
        with contextlib.suppress(AdapterError):
            await asyncio.to_thread(self._store.verify, digest)
            return True
        return False

    async def _mend(self, digest: str) -> None:
        why, again_s = self._lost.get(digest, ("its files are not in the store", 0.0))
        if time.monotonic() < again_s:
            raise FilesLost(why)
        for content in list(self._named(digest)):
            try:
                await self._fetched(content)
            except AdapterError as error:
                why = f"{content.name}: {error}"
            else:
                logger.warning("adapter %s: its stored files were changed or gone; they are back "
                               "from %s", content.name, content.source)  # fmt: skip
                return
        logger.error("stored files of an adapter are lost: %s", why)
        self._lost[digest] = why, time.monotonic() + AGAIN_S
        raise FilesLost(why)
