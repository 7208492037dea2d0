"""The server's lines on its terminal: progress while it loads, then the served models."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

logger = logging.getLogger("coxswain")


class OnStage(Protocol):
    """Called with what is under way."""

    def __call__(self, text: str, detail: str = "") -> None:
        """Takes the next stage.

        Args:
            text: for everybody.
            detail: for the terminal, in its place; may name streams.
        """


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
        self._every_s = every_s
        self._stage = ""
        self._began = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._bar = bar(SpinnerColumn("line"), TEXT, TimeElapsedColumn(), lines=as_json())
        self._task = self._bar.add_task("")

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def stage(self, text: str) -> None:
        """The current stage of the start."""
        self._stage = text
        self._bar.update(self._task, description=text)
        if self._bar.disable:
            self._show()

    def _tick(self) -> None:
        while not self._done.wait(self._every_s):
            self._show()

    def _show(self) -> None:
        say(f"coxswain: {self._stage} … {self.seconds:.0f} s")


TEXT = TextColumn("{task.description}", markup=False)
"""What is under way. Names may hold what would be markup."""


def bar(*columns: ProgressColumn, lines: bool = False) -> Bars:
    """A line on standard error that is rewritten, and gone at the end; disabled on no terminal.

    Args:
        columns: what it shows.
        lines: disabled anyway.
    """
    console = Console(stderr=True)
    return Bars(*columns, console=console, transient=True,
                disable=lines or not console.is_terminal)  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns; the first row is the head."""
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in rows[0]:
        grid.add_column(Text(name))
    for row in rows[1:]:
        grid.add_row(*(Text(cell) for cell in row))
    # Each row in one line, however long: programs read it too.
    text = StringIO()
    Console(width=1 << 16, file=text).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def facts(record: Mapping[str, Any]) -> str:
    """A line for each field of a record."""
    width = max(map(len, record))
    return "\n".join(f"{name:<{width}}  {_told(value)}".rstrip() for name, value in record.items())


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_told(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_told(item) for item in value)
    return "" if value is None else str(value)
