"""The interface of the engine side for the registry side, and the loaded contents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.registry.record import Content, Facts


@dataclass(frozen=True)
class Loaded:
    """An adapter that answers here.

    Args:
        content: with its digest.
        folder: its files.
    """

    content: Content
    folder: Path


class Loader(Protocol):
    """Makes contents answerable on the engine of this replica. Called on the event loop, awaited.

    For one name loads never overlap; for different names they may. A content may be loaded again
    while an `unload` of it still waits for requests: then it stays.
    """

    async def load(self, content: Content, folder: Path, *, now: bool = True) -> Facts:
        """Makes a content answerable, beside an older one of the same name that still answers.

        Args:
            content: `digest` is set; (name, digest) is new to the engine, or its last unload
                has been called.
            folder: its files, read-only, there until `unload` has returned.
            now: it goes into the engine at once, and others make room; false: only if there is room
                to spare, else when a request asks for it. Then its values were read before, by
                the replica that registered it, and its bytes are when the engine reads them.

        Raises:
            AdapterError: `DoesNotFit` or `BadAdapter`: the engine is as it was.
        """
        ...

    async def unload(self, content: Content) -> None:
        """Gives the memory back, once the requests that run on it are done.

        From before this call no new request is given this content. Unknown contents are fine.
        """
        ...
