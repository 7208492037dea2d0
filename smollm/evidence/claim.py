"""What a claim has measured: shares and means with intervals, tables, plots, and its verdict."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Z = 1.96
"""Of a 95 % interval."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A share of items, with Wilson's 95 % interval (Wilson 1927)."""

    hits: int
    of: int

    @classmethod
    def over(cls, found: Iterable[bool]) -> Share:
        """The share of the true ones."""
        items = [bool(one) for one in found]
        return cls(sum(items), len(items))

    @property
    def value(self) -> float:
        """0 to 1."""
        return self.hits / self.of

    @property
    def low(self) -> float:
        """The lower end of the interval, 0 to 1."""
        return max(0.0, self._middle - self._half) if self.hits else 0.0

    @property
    def high(self) -> float:
        """The upper end of the interval, 0 to 1."""
        return min(1.0, self._middle + self._half) if self.hits < self.of else 1.0

    @property
    def _middle(self) -> float:
        return (self.value + Z * Z / (2 * self.of)) / (1 + Z * Z / self.of)

    @property
    def _half(self) -> float:
        n, p = self.of, self.value
        return Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)


@dataclass(frozen=True)
class Mean:
    """A mean over items, with a 95 % interval from resampled items (percentile bootstrap)."""

    value: float
    low: float
    high: float
    of: int

    @classmethod
    def over(cls, values: Sequence[float], seed: int = 0) -> Mean:
        """The mean of at least one value; the resamples are drawn from a fixed seed."""
        import numpy as np

        items = np.asarray(values, dtype=np.float64)
        generator = np.random.default_rng(seed)
        drawn = generator.integers(0, len(items), (RESAMPLES, len(items)))
        low, high = np.percentile(items[drawn].mean(axis=1), [2.5, 97.5])
        return cls(statistics.fmean(values), float(low), float(high), len(items))


Measured: TypeAlias = Share | Mean
Cell: TypeAlias = str | float | Share | Mean
Point: TypeAlias = tuple[float, float, float, float]
"""x, y, and the ends of y's interval."""


def above(ours: Measured, other: Measured) -> bool:
    """Whether one is larger than the other and their intervals do not overlap."""
    return ours.low > other.high


def below(ours: Measured, other: Measured) -> bool:
    """Whether one is smaller than the other and their intervals do not overlap."""
    return ours.high < other.low


@dataclass(frozen=True)
class Table:
    """Rows under the heads of columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells under {len(self.columns)} heads")


@dataclass(frozen=True)
class Plot:
    """Lines with intervals."""

    title: str
    x: str
    y: str
    series: dict[str, list[Point]]


@dataclass(frozen=True)
class Claim:
    """One claim and what came out.

    `holds`: our interval and that of the best prompt do not overlap, and ours is the better one.
    """

    name: str
    title: str
    claim: str
    holds: bool
    best_prompt: Measured | None
    ours: Measured | None
    how: str
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    seconds: float = 0.0
    date: str = ""
    """Of the run, as `December 2026`."""
    examples: tuple[tuple[str, str, str], ...] = field(default=())
    """Prompt, reply of the plain model, reply of the steered one."""

    def write(self, folder: Path) -> Path:
        """Writes `<name>.json` into a folder and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        text = json.dumps(_plain(self), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", "utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Claim:
        """What `write` wrote."""
        found = json.loads(path.read_text("utf-8"))
        tables = tuple(
            Table(
                table["title"],
                tuple(table["columns"]),
                tuple(tuple(_cell(cell) for cell in row) for row in table["rows"]),
                table["note"],
            )
            for table in found["tables"]
        )
        plots = tuple(
            Plot(
                plot["title"],
                plot["x"],
                plot["y"],
                {name: [_point(p) for p in line] for name, line in plot["series"].items()},
            )
            for plot in found["plots"]
        )
        return cls(
            **{
                **found,
                "tables": tables,
                "plots": plots,
                "best_prompt": _cell(found["best_prompt"]),
                "ours": _cell(found["ours"]),
                "examples": tuple((a, b, c) for a, b, c in found["examples"]),
            }
        )


def _point(values: Sequence[float]) -> Point:
    x, y, low, high = values
    return x, y, low, high


def _plain(value: Any) -> Any:
    """As JSON has it; a share also has its value and interval, for who reads the file."""
    if isinstance(value, Share):
        keys = ("hits", "of", "value", "low", "high")
        return {key: _plain(getattr(value, key)) for key in keys}
    if isinstance(value, (Mean, Table, Plot, Claim)):
        return {key: _plain(one) for key, one in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    # More digits than anybody reads would change with every run.
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _cell(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "hits" in value:
        return Share(value["hits"], value["of"])
    return Mean(value["value"], value["low"], value["high"], value["of"])
