"""What the server says on its terminal: progress while it loads, then what it serves."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

logger = logging.getLogger("coxswain")


def say(text: str) -> None:
    """Something for people, on standard error, at once; one JSON object where logs are JSON."""
    if as_json():
        logger.info(text.removeprefix("coxswain: "))
    else:
        print(text, file=sys.stderr, flush=True)


def as_json() -> bool:
    """Whether the server's lines are JSON (`server.operation.logs`)."""
    return any(isinstance(handler, JsonHandler) for handler in logging.getLogger().handlers)


class JsonHandler(logging.StreamHandler[TextIO]):
    """Writes the JSON lines."""


class Progress:
    """Names the stage that is under way, with the seconds since the start.

    On a terminal one line is rewritten; elsewhere a line is written for each new stage, and one
    every `every_s` seconds, so that logs show that something still happens.

    Args:
        every_s: seconds between lines where there is no terminal.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        self._tty = sys.stderr.isatty() and not as_json()
        self._every_s = 0.2 if self._tty else every_s
        self._stage = ""
        self._began = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(timeout=1)
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def stage(self, text: str) -> None:
        """What is under way from now on."""
        self._stage = text
        if not self._tty:
            self._show()

    def _tick(self) -> None:
        while not self._done.wait(self._every_s):
            self._show()

    def _show(self) -> None:
        if self._tty:
            turn = "|/-\\"[int(self.seconds * 5) % 4]
            text = f"\r\033[K{turn} {self._stage} … {self.seconds:.0f} s"
            print(text, end="", file=sys.stderr, flush=True)
        else:
            say(f"coxswain: {self._stage} … {self.seconds:.0f} s")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def facts(record: Mapping[str, Any]) -> str:
    """A line for each field of a record."""
    width = max(map(len, record))
    return "\n".join(f"{name:<{width}}  {_told(value)}".rstrip() for name, value in record.items())


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_told(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_told(one) for one in value)
    return "" if value is None else str(value)
