"""Which contents running requests use: a content is unloaded when its last lease is over."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Leases:
    """Counts requests by the digest of the contents that they use. On the event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._ended = asyncio.Event()

    @contextmanager
    def lease(self, digests: Iterable[str]) -> Iterator[None]:
        """Keeps some contents in use."""
        held = set(digests)
        self._counts.update(held)
        try:
            yield
        finally:
            self._counts.subtract(held)
            self._counts += Counter()  # drops zeros
            self._ended.set()

    def used(self, digest: str) -> bool:
        """Whether some request uses a content."""
        return bool(self._counts[digest])

    async def free(self, digest: str) -> None:
        """Waits until no request uses a content."""
        while self.used(digest):
            self._ended.clear()
            await self._ended.wait()
