"""The plots of `load_tests.load`'s report, as SVG that is the same for the same figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "coxswain", "font.size": 9}


@contextmanager
def _figure(file: Path, columns: int = 1, width: float = 6.5) -> Iterator[list[Axes]]:
    """Axes side by side, saved at the end."""
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    yield axes
    figure.savefig(file, metadata={"Date": None})


def _median(found: Mapping[str, Any], name: str, level: str, figure: str) -> float | None:
    runs = [one[name][level][figure] for one in found["rounds"] if level in one.get(name, {})]
    return statistics.median(runs) if runs else None


def throughput_plot(found: Mapping[str, Any], file: Path) -> None:
    """Output tokens per second: a group of bars per level, a bar per scenario."""
    scenarios, levels = found["scenarios"], list(found["levels"])
    width = 0.8 / len(scenarios)
    with _figure(file, width=9) as (axes,):
        for i, (name, scenario) in enumerate(scenarios.items()):
            heights = [_median(found, name, lv, "output_throughput") or 0.0 for lv in levels]
            places = [x + (i - (len(scenarios) - 1) / 2) * width for x in range(len(levels))]
            axes.bar(places, heights, width, label=scenario["title"])
        rates = [f"{lv}\n{load['rate']:g} requests/s" for lv, load in found["levels"].items()]
        axes.set_xticks(range(len(levels)), rates)
        axes.set_ylabel("output tokens per second")
        axes.legend(fontsize=7)


def latency_plot(found: Mapping[str, Any], file: Path) -> None:
    """The 99th percentiles of TTFT and ITL over the arrival rate."""
    shown = {"p99_ttft_ms": "TTFT p99, ms", "p99_itl_ms": "ITL p99, ms"}
    rates = {level: load["rate"] for level, load in found["levels"].items()}
    with _figure(file, len(shown), width=9) as all_axes:
        for axes, (figure, label) in zip(all_axes, shown.items(), strict=True):
            for name, scenario in found["scenarios"].items():
                values = {lv: _median(found, name, lv, figure) for lv in rates}
                points = [(rates[lv], value) for lv, value in values.items() if value is not None]
                axes.plot(*zip(*points, strict=True), marker="o", label=scenario["title"])
            axes.set(xlabel="requests per second", ylabel=label, xscale="log", yscale="log")
        all_axes[0].legend(fontsize=7)


def growth_plot(label: str, line: Mapping[str, Any], file: Path) -> None:
    """A step's cost and the ideal, medians with the range over the rounds."""
    at = [int(x) for x in line]
    with _figure(file) as (axes,):
        for key, style in (("steered", "o-"), ("ideal", "k--")):
            middle = [statistics.median(line[x][key]) for x in line]
            below = [m - min(line[x][key]) for m, x in zip(middle, line, strict=True)]
            above = [max(line[x][key]) - m for m, x in zip(middle, line, strict=True)]
            name = "steered" if key == "steered" else "ideal: the streams' own steps, summed"
            axes.errorbar(at, middle, (below, above), fmt=style, capsize=3, label=name)
        axes.set(xlabel=label, ylabel="milliseconds of a decode step")
        axes.set_ylim(bottom=0)
        axes.set_xticks(at, list(line))
        axes.legend()
