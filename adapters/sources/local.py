"""Folders under the allowed roots."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import BadSource
from adapters.sources.origin import CHUNK, AbsentError, Opened
from adapters.sources.source import Source


class LocalFolder:
    """An `Origin`. Symlinks are followed as long as they end under a root.

    Args:
        source: of kind local.
        roots: where files may lie.
    """

    def __init__(self, source: Source, roots: tuple[Path, ...]) -> None:
        self._folder = Path(source.place)
        self._roots = tuple(root.resolve() for root in roots)
        if not self._folder.is_dir():
            raise BadSource("no such folder", field="source", value=source.text)

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        """See `Origin`."""
        try:
            # Not blocking: a named pipe would hang the open until someone writes to it.
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise AbsentError(name) from None
        except OSError as error:
            raise BadSource(f"cannot be read: {error.strerror}", field=name) from error
        try:
            size = self._check(handle, name)
        except BaseException:
            os.close(handle)
            raise
        with open(handle, "rb", buffering=0) as file:
            yield Opened(size, iter(lambda: file.read(CHUNK), b""))

    def _check(self, handle: int, name: str) -> int:
        """Its bytes. Asked of the open file, so that nothing can be exchanged after the check."""
        real = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise BadSource("leads out of the allowed roots", field=name)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadSource("not a regular file", field=name)
        return status.st_size

    def close(self) -> None:
        """See `Origin`."""
