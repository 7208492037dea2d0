"""The sections, what each needs, and how one is run in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Case = TypeVar("Case")

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 30.0
"""Seconds over its time after which a section is stopped."""


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        letter: its name for `--only`.
        title: what it checks.
        function: module in this package, and the function in it: `Clock` → `Finding`.
        seconds: its share of the time.
        engine: whether it starts vLLM engines.
    """

    letter: str
    title: str
    function: tuple[str, str]
    seconds: float
    engine: bool = False


SECTIONS = (
    Section("A", "adapter sum against the definition", ("kernels", "adapter_sum"), 70),
    Section("B", "read-out against the definition", ("kernels", "read_outs"), 70),
    Section("C", "graphs replayed over new data", ("recorded", "replays"), 40),
    Section("D", "no host wait inside a step", ("recorded", "waits"), 20),
    Section("E", "kernel times", ("speed", "kernel_times"), 70),
    Section("F", "toy decoder of two streams", ("toy", "launches"), 30),
    Section("G", "steered engine against transformers", ("engine", "exactness"), 110, engine=True),
    Section("H", "steered step over its streams' steps", ("engine", "ratios"), 190, engine=True),
)

Status = Literal["PASS", "FAIL", "SKIPPED"]


class Skipped(Exception):
    """A section cannot run here; says why."""


@dataclass(frozen=True)
class Finding:
    """What a section found.

    Args:
        passed: whether everything was right.
        figure: one line.
        data: for the JSON.
    """

    passed: bool
    figure: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A section's line."""

    letter: str
    title: str
    status: Status
    figure: str
    seconds: float
    data: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"{self.letter}  {self.status:<7}  {self.title}: {self.figure} ({self.seconds:.0f} s)"
        )


class Clock:
    """The time of a section.

    Args:
        seconds: until no further case is begun.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._left_out = 0

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def cases(self, cases: Sequence[Case]) -> Iterator[Case]:
        """The cases as long as there is time: the first one always."""
        for i, case in enumerate(cases):
            if i and self.left() < 0:
                self._left_out += len(cases) - i
                return
            yield case

    def note(self) -> str:
        """What a figure says of cases for which there was no time; '' if there were none."""
        return f"; {self._left_out} cases left out, no time" if self._left_out else ""


Run = Callable[[Section, float], Outcome]
"""(section, its seconds) → what came of it."""


def here(section: Section, seconds: float) -> Outcome:
    """Runs a section in this process. Whatever it raises is its outcome."""
    begin, module = time.monotonic(), f"{__package__}.{section.function[0]}"
    clock = Clock(seconds)
    data: dict[str, Any] = {}
    try:
        function = getattr(importlib.import_module(module), section.function[1])
        found: Finding = function(clock)
        status: Status = "PASS" if found.passed else "FAIL"
        figure, data = found.figure + clock.note(), found.data
    except Skipped as why:
        status, figure = "SKIPPED", str(why)
    except Exception as error:
        status, figure = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    taken = time.monotonic() - begin
    return Outcome(section.letter, section.title, status, figure, round(taken, 1), data)


def apart(section: Section, seconds: float) -> Outcome:
    """Runs a section in a process of its own, and stops it when it takes too long.

    A kernel that reads where it must not ends its process's use of the device.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "outcome.json", Path(folder) / "log"
        command = [
            sys.executable,
            "-m",
            f"{__package__}.one",
            section.letter,
            str(seconds),
            str(out),
        ]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=errors, stderr=errors, start_new_session=True
            )
        try:
            process.wait(seconds + GRACE_S)
            figure = f"the process ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            figure = f"stopped after {seconds + GRACE_S:.0f} s"
        finally:
            _end(process)
        if out.exists():
            return Outcome(**json.loads(out.read_text()))
        lines = log.read_text(errors="replace").strip().splitlines()
        figure += f": {lines[-1][:300]}" if lines else ""
    taken = round(time.monotonic() - begin, 1)
    return Outcome(section.letter, section.title, "FAIL", figure, taken, {"log": lines[-40:]})


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
