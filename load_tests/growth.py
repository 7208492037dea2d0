"""How the cost of a steered step grows, beside the ideal: the sum of its streams' own steps.

    python -m load_tests.growth --out growth.json     # about eight minutes on two quiet cores

Real engines with a base of 220 M and companions of 21 M random weights in bfloat16. The ideal is
measured in the same round: the base and a companion, each served alone by plain vLLM. None of the
engines is compiled; `load_tests.step_bench` has compiled ones. Four lines: over
the number of streams, the rows of a batch, the length of the context, and the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_tests.adapter_engine import STEERED
from load_tests.rounds import Engine, Round, Work, rounds, running, spread
from load_tests.shapes import BASE, COMPANION, VOCAB, write_model

PROMPT, DRAWN = 32, 24
ROWS = 16
STREAMS = 3
"""Number of streams in the lines over rows, contexts and vocabularies."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        streams: numbers of streams, the base among them; at least 1.
        rows: of a batch.
        contexts: tokens of the prompts, of `context_rows` rows; all must fit in one step.
        vocabularies: tokens.
        context_rows: rows of the line over contexts.
    """

    streams: tuple[int, ...] = (1, 2, 3, 4)
    rows: tuple[int, ...] = (1, 4, 16, 64)
    contexts: tuple[int, ...] = (64, 256, 512, 960)
    vocabularies: tuple[int, ...] = (VOCAB, 64_000, 128_256)
    context_rows: int = 4


QUICK = Sizes((1, 3), (1, 16), (64, 512), (VOCAB, 64_000))
AXES = {
    "streams": f"streams, {ROWS} rows",
    "rows": f"rows, {STREAMS} streams",
    "contexts": f"tokens of context, {Sizes.context_rows} rows, {STREAMS} streams",
    "vocabularies": f"vocabulary, {ROWS} rows, {STREAMS} streams",
}
"""The lines, and what their abscissas are."""

Line = dict[str, dict[str, list[float]]]
"""Abscissa → {"steered", "ideal"} → milliseconds per round."""


class Growth:
    """The four lines.

    Args:
        folder: for models.
        sizes: what to measure.
        count: rounds, besides one to warm up.
    """

    def __init__(self, folder: Path, sizes: Sizes, count: int) -> None:
        self._folder, self._sizes, self._count = folder, sizes, count

    def _kinds(self, vocabulary: int, streams: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """base, companion, and "N": an engine with N streams."""
        paths = {}
        for name, shape in (("base", BASE), ("companion", COMPANION)):
            folder = self._folder / f"{name}-{vocabulary}"
            if not folder.exists():
                write_model(folder, shape, vocabulary)
            paths[name] = str(folder)
        # Compiling a dozen engines would take longer than everything else.
        engine = {"kv_cache_memory_bytes": 768 << 20, "enforce_eager": True}
        common = {"sets": 0, "rank": 0, "adapters": {}, "engine": engine}
        kinds: dict[str, dict[str, Any]] = {
            name: {**common, "model": path, "ours": False} for name, path in paths.items()
        }
        for number in streams:
            companions = {f"stream{i}": paths["companion"] for i in range(1, number)}
            kinds[str(number)] = {
                **common, "model": paths["base"], "ours": True, "streams": companions
            }  # fmt: skip
        return kinds

    def measure(self) -> dict[str, Line]:
        """All lines."""
        sizes = self._sizes
        first, *others = sizes.vocabularies
        numbers = tuple(sorted({*sizes.streams, STREAMS}))
        found: dict[str, Line] = {}
        with running(self._kinds(first, numbers)) as engines:
            works = {f"streams {n}": _work(engines, n, ROWS) for n in sizes.streams}
            works |= {f"rows {n}": _work(engines, STREAMS, n) for n in sizes.rows}
            works |= {
                f"contexts {n}": _work(engines, STREAMS, sizes.context_rows, n)
                for n in sizes.contexts
            }
            works[f"vocabularies {first}"] = _work(engines, STREAMS, ROWS)
            self._add(found, rounds(self._count, works))
        for vocabulary in others:
            with running(self._kinds(vocabulary, (STREAMS,))) as engines:
                works = {f"vocabularies {vocabulary}": _work(engines, STREAMS, ROWS)}
                self._add(found, rounds(self._count, works))
        return found

    def _add(self, found: dict[str, Line], measured: list[Round]) -> None:
        for label in measured[0]:
            axis, at = label.split()
            number = int(at) if axis == "streams" else STREAMS
            found.setdefault(axis, {})[at] = {
                "steered": [one[label]["steered"] for one in measured],
                "ideal": [
                    one[label]["base"] + (number - 1) * one[label].get("companion", 0.0)
                    for one in measured
                ],
            }


def _work(engines: Mapping[str, Engine], streams: int, rows: int, prompt: int = PROMPT) -> Work:
    """What measures one point: milliseconds of a decode step of each engine."""

    def asking(engine: Engine, name: str | None) -> Callable[[], float]:
        def measure() -> float:
            own = [name] * rows
            return float(engine.ask("serve", rows=own, prompt=prompt, drawn=DRAWN)["decode"])

        return measure

    name = STEERED if streams > 1 else None
    work = {"steered": asking(engines[str(streams)], name), "base": asking(engines["base"], None)}
    if streams > 1:
        work["companion"] = asking(engines["companion"], None)
    return work


def table(name: str, line: Line) -> str:
    """A Markdown table of one line: medians, and the ratio's median and range over the rounds."""
    out = [f"| {AXES[name]} | steered, ms | ideal, ms | steered / ideal |", "|---|---|---|---|"]
    for at, point in line.items():
        ratios = [s / i for s, i in zip(point["steered"], point["ideal"], strict=True)]
        cells = [f"{statistics.median(point[key]):.1f}" for key in ("steered", "ideal")]
        out.append("| " + " | ".join([at, *cells, spread(ratios)]) + " |")
    return "\n".join(out)


def run(quick: bool, count: int) -> dict[str, Line]:
    """All lines, with models in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return Growth(Path(folder), QUICK if quick else Sizes(), count).measure()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often to repeat (default 3)")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    found = run(args.quick, args.rounds)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, line in found.items():
        print(f"{table(name, line)}\n")
    print("Milliseconds of a decode step.", file=sys.stderr)


if __name__ == "__main__":
    main()
