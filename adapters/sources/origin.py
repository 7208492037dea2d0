"""The common interface of the four kinds of sources: files by name, in chunks.

No listing is needed: an adapter's own config says which files belong to it, so nothing else of a
place is ever read, least of all a pickle that lies beside the tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import BadAdapter, SourceAway

CHUNK = 1 << 20
"""Bytes read at a time."""

HEAD = 32
"""Bytes from which `check_beginning` knows what a file is."""


@dataclass(frozen=True)
class Limits:
    """Limits for one adapter.

    Args:
        max_bytes: all its files together.
        max_file_bytes: each.
        max_files: how many.
        timeout_s: for the whole fetch, seconds.
        connect_s: until a server accepts, seconds.
        read_s: longest silence of a server, seconds.
        tries: per file; failures that may pass are tried again, with growing pauses.
    """

    max_bytes: int = 4 << 30
    max_file_bytes: int = 4 << 30
    max_files: int = 512
    timeout_s: float = 1800.0
    connect_s: float = 10.0
    read_s: float = 30.0
    tries: int = 3


class AbsentError(Exception):
    """The place has no file of this name (or does not show it to us)."""


@dataclass
class Opened:
    """A file being read.

    Args:
        size: bytes, if the place says so; never trusted without counting.
        chunks: its content, each chunk at most a few MiB.
    """

    size: int | None
    chunks: Iterator[bytes]


class Origin(Protocol):
    """One place, opened for one fetch. Blocking; used by one thread."""

    def open(self, name: str) -> AbstractContextManager[Opened]:
        """A file of the adapter, by its relative name.

        Raises:
            AbsentError: there is none.
            SourceAway: the place does not answer; trying again may help.
            BadSource: it leads somewhere that is not allowed.
        """
        ...

    def close(self) -> None:
        """Gives connections back."""
        ...


@dataclass
class Clock:
    """The deadline of one fetch.

    Args:
        ends_s: `time.monotonic()` at which it is over.
    """

    ends_s: float

    @classmethod
    def start(cls, limits: Limits) -> Clock:
        """A clock that begins now."""
        return cls(time.monotonic() + limits.timeout_s)

    def check(self) -> None:
        """Raises SourceAway once the time is over."""
        if time.monotonic() > self.ends_s:
            raise SourceAway("the source is too slow: the time limit for a whole fetch is over",
                             field="source")  # fmt: skip


def persistently(work: Callable[[], None], tries: int, clock: Clock) -> None:
    """Does the work; again after failures that may pass.

    Raises:
        SourceAway: the last failure.
    """
    for again in range(tries):
        clock.check()
        try:
            return work()
        except SourceAway:
            if again == tries - 1:
                raise
            time.sleep(min(0.2 * 4**again, 5.0))
    raise AssertionError("tries is at least 1")


_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive or a pickle"),
    (b"\x80\x02", "a pickle"), (b"\x80\x03", "a pickle"), (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"), (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"), (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a rar archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "a web page"), (b"<html", "a web page"),
)  # fmt: skip


def check_beginning(name: str, head: bytes) -> None:
    """Refuses what only has the name of a safetensors or JSON file.

    A safetensors file begins with the length of its header, by the format at most 100 MB, so its
    bytes 4 to 7 are zero; none of the others' are.

    Raises:
        BadAdapter: it is something else.
    """
    if name.lower().endswith(".safetensors") and head[4:8] == bytes(4):
        return
    if name.lower().endswith(".gguf") and not head.startswith(b"GGUF"):
        raise BadAdapter("not a GGUF file", field=name)
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise BadAdapter(f"this is {what}", field=name)
