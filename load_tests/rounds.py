"""Engines that are asked in turn, and tables of the ratios; for `adapter_bench` and `growth`."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from load_tests.adapter_engine import ANSWER

Round = dict[str, dict[str, float]]
"""Workload → column → figure, of one round."""


class EngineError(RuntimeError):
    """An engine did not start, or ended; says what it wrote last."""


class Engine:
    """An engine in a process of its own.

    Args:
        kind: see `adapter_engine.Driven`.
    """

    def __init__(self, **kind: Any) -> None:
        self.adapters: tuple[str, ...] = tuple(kind["adapters"])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the engine
        self._process = subprocess.Popen(
            [sys.executable, "-m", "load_tests.adapter_engine", json.dumps(kind)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """What a method of `adapter_engine.Driven` returns."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if "Error" in line]
        raise EngineError(lines[-1] if lines else f"exit code {self._process.wait()}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(kinds: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Engine]]:
    """Engines by name; one that does not start is said on standard error and left out."""
    found: dict[str, Engine] = {}
    try:
        for name, kind in kinds.items():
            print(f"  starting: {name}", file=sys.stderr)
            try:
                found[name] = Engine(**kind)
            except EngineError as error:
                print(f"  {name} does not start: {error}", file=sys.stderr)
        yield found
    finally:
        for engine in found.values():
            engine.close()


Work = dict[str, Callable[[], float]]
"""Column → what measures it: milliseconds, or tokens per second."""


def rounds(count: int, works: Mapping[str, Work]) -> list[Round]:
    """Measures every workload in every round, each time in another order of the columns."""
    found: list[Round] = []
    for i in range(count + 1):
        print(f"  round {i} of {count}" + (" (warm-up)" if not i else ""), file=sys.stderr)
        one: Round = {}
        for label, work in works.items():
            names = list(work)
            start = i % len(names)
            figures = {name: work[name]() for name in names[start:] + names[:start]}
            one[label] = {name: figures[name] for name in names}
        found.append(one)
    return found[1:]


def table(
    name: str, found: Sequence[Round], baseline: str, ratio: Callable[[float, float], float]
) -> str:
    """A Markdown table: the baseline's figure, and every other column relative to it.

    Args:
        name: of the first column.
        found: the rounds.
        baseline: the column to compare with.
        ratio: of (a figure, the baseline's figure).
    """
    columns = list(dict.fromkeys(c for work in found[0].values() for c in work))
    columns.remove(baseline)
    lines = [
        "| " + " | ".join([name, baseline, *columns]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for label, first in found[0].items():
        base = [one[label][baseline] for one in found]
        cells = [label, f"{statistics.median(base):.1f}"]
        for column in columns:
            ratios = [
                ratio(one[label][column], one[label][baseline]) for one in found if column in first
            ]
            cells.append(spread(ratios) if ratios else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def faster(figure: float, baseline: float) -> float:
    """Ratio of throughputs, of milliseconds."""
    return baseline / figure


def dearer(figure: float, baseline: float) -> float:
    """Ratio of times."""
    return figure / baseline
