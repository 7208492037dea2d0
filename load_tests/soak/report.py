"""The soak's page and its plot, from the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from load_tests.soak.kinds import TOLERANCE
from load_tests.soak.verdict import MIB, WARM_UP, judged, line

mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "coxswain", "font.size": 9}

OUTCOMES = {
    "right": "compared, right",
    "sampled": "sampled",
    "gone": "404, rightly",
    "refused": "refused, rightly",
    "left": "client left",
    "done": "done",
    "wrong": "wrong",
    "failed": "failed",
}
ROLES = {"engine": "engine", "api": "API", "other": "others"}
PERCENTILES = (50, 99)
COUNTED = {
    "rss.all": "bytes resident, files that processes share counted for each",
    "fds.all": "file descriptors",
    "threads.all": "threads",
    "store": "contents in the store",
    "records": "adapters in the registry",
    "registry_bytes": "bytes of the registry's files",
    "log_bytes": "bytes of log",
}


def latencies(records: Iterable[Mapping[str, Any]], begin: float, end: float) -> dict[str, Any]:
    """Percentiles of the first and the last quarter, milliseconds.

    Args:
        records: of streams: `at`, `first` (seconds) and `gaps`.
        begin: of the soak, Unix seconds.
        end: of it.
    """
    quarter = (end - begin) / 4
    found: dict[str, Any] = {}
    streams = [one for one in records if one.get("gaps")]
    for name, low in (("first quarter", begin), ("last quarter", end - quarter)):
        own = [one for one in streams if low <= one["at"] < low + quarter]
        if not own:
            continue
        figures = {"ttft": [one["first"] for one in own],
                   "itl": [gap for one in own for gap in one["gaps"]]}  # fmt: skip
        found[name] = {
            f"p{p}_{figure}_ms": round(float(np.percentile(values, p)) * 1e3, 1)
            for figure, values in figures.items()
            for p in PERCENTILES
        }
    return found


def page(found: Mapping[str, Any], folder: str) -> str:
    """The report.

    Args:
        found: the figures.
        folder: where the plot is, relative to the page.
    """
    promises = judged(found)
    parts = [
        "# Soak", _setting(found), "## Promises",
        _table(["promise", "found", "kept"],
               [[p.says, p.value, "yes" if p.met else "**no**"] for p in promises]),
        "## Figures", _table(["", ""], _figures(found)),
        f"![Memory over time]({folder}/memory.svg)",
        "## Time to the first token and between tokens, ms", _latency(found["latencies"]),
        "## Requests by kind", _kinds(found["counts"]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _setting(found: Mapping[str, Any]) -> str:
    own = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
    engine = ", ".join(f"{k} {v}" for k, v in found["engine"].items())
    ran = f"It ran {found['seconds'] / 60:.0f} minutes"
    if found["interrupted"]:
        ran += f" of {found['asked_minutes']:g}, and was then interrupted"
    return f"""\
Written by `make soak` (`python -m load_tests.soak`); every figure is measured. {ran}.

- Server: the demo zoo's, with every method, companion and head, in float32 so that answers can be
  compared; {found["slots"]} slots for sets of adapters, fewer than are used; {engine}.
- Users: {found["users"]} tenants, closed loop, and four administrators who load, replace, pin and
  unload adapters all the time, in use or not.
- Greedy answers are compared at once, token by token, with {found["references"]} replies of plain
  `transformers` and PEFT models, computed before the soak; where an adapter is being changed, with
  each that it may be. Of the sampled answers some of each kind are computed again afterwards. An
  answer is wrong if a token differs or a log-probability is off by {TOLERANCE:g}.
- Memory is what no file backs, anonymous and shared pages of all processes of the server
  (`/proc/PID/smaps_rollup`): how much of the libraries is resident depends on what else runs.
- Machine: {own["processor"]}, {own["cores"]} cores, {own["memory_bytes"] / 2**30:.0f} GiB,
  {own["system"]}; the clients run on the same cores.
- Versions: {versions}."""


def _figures(found: Mapping[str, Any]) -> list[list[str]]:
    samples: Sequence[Mapping[str, float]] = found["samples"]
    counts = found["counts"]
    total = {o: sum(one.get(o, 0) for one in counts.values()) for o in OUTCOMES}
    changes = {k: sum(v.values()) for k, v in counts.items() if k.startswith("adapters: ")}
    again, requests = found["rechecked"], sum(total.values())
    operations = ", ".join(
        f"{k.removeprefix('adapters: ')} {n:,}" for k, n in sorted(changes.items())
    )
    rows = [
        ["duration", f"{found['seconds'] / 60:.1f} minutes"],
        ["requests", f"{requests:,} ({requests / found['seconds']:.1f} per second)"],
        ["tokens", f"{found['tokens']:,} received by clients"],
        ["answers compared at once", f"{total['right'] + total['wrong']:,}"],
        ["of them wrong; largest error", f"{total['wrong']}; {found['worst']:.1e}"],
        ["sampled answers computed again", f"{again['answers']:,} (of {total['sampled']:,})"],
        ["of them wrong; largest error", f"{len(again['wrong'])}; {again['worst']:.1e}"],
        ["refused, rightly", f"{total['refused']:,}"],
        ["404 for adapters that were gone, rightly", f"{total['gone']:,}"],
        ["clients that left", f"{total['left']:,}"],
        ["failed", f"{total['failed']:,}"],
        ["operations on adapters", f"{sum(changes.values()):,}: {operations}"],
    ]  # fmt: skip
    if samples:
        last = samples[-1]
        rows += [
            ["sets of adapters brought into the engine", f"{last['set_loads']:.0f}"],
            ["and taken out", f"{last['set_evictions']:.0f}"],
            ["requests preempted", f"{last['preemptions']:.0f}"],
            ["steps of the engine", f"{last['steps']:,.0f}"],
            *_memory(samples),
        ]
    return rows


def _memory(samples: Sequence[Mapping[str, float]]) -> list[list[str]]:
    begin, end = samples[0]["at"], samples[-1]["at"]
    warm = next(s for s in samples if s["at"] >= begin + WARM_UP * (end - begin))
    rows = []
    for role, name in {"all": "all processes", **ROLES}.items():
        figure = f"own.{role}"
        if not all(figure in one for one in samples) or not (fit := line(samples, figure)):
            continue
        middle = " → ".join(f"{one[figure] / MIB:.1f}" for one in (samples[0], warm, samples[-1]))
        slope, low, high = (f"{x / MIB:+.1f}" for x in (fit.per_hour, fit.low, fit.high))
        rows.append([f"memory, {name}: first sample, after a third, last", f"{middle} MiB"])
        rows.append(
            [f"its slope after that third, {name}", f"{slope} MiB per hour ({low} to {high})"]
        )
    for figure, name in COUNTED.items():
        values = [one[figure] for one in (samples[0], warm, samples[-1])]
        most = max(one[figure] for one in samples)
        rows.append([f"{name}: first sample, after a third, last (most)",
                     " → ".join(f"{v:,.0f}" for v in values) + f" ({most:,.0f})"])  # fmt: skip
    return rows


def _latency(found: Mapping[str, Mapping[str, float]]) -> str:
    columns = [f"p{p}_{figure}_ms" for figure in ("ttft", "itl") for p in PERCENTILES]
    head = ["", *(f"{c.split('_')[1].upper()} {c.split('_')[0]}" for c in columns)]
    return _table(head, [[name, *(f"{one[c]:g}" for c in columns)] for name, one in found.items()])


def _kinds(counts: Mapping[str, Mapping[str, int]]) -> str:
    shown = [
        o for o in OUTCOMES if o in ("wrong", "failed") or any(o in c for c in counts.values())
    ]
    rows = [[kind, *(f"{one.get(o, 0):,}" for o in shown)] for kind, one in sorted(counts.items())]
    return _table(["kind", *(OUTCOMES[o] for o in shown)], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def plot(samples: Sequence[Mapping[str, float]], file: Path) -> None:
    """The memory of each process over time, with the fitted line; the same for the same figures."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    minutes = [(one["at"] - samples[0]["at"]) / 60 for one in samples]
    for role, name in {"all": "all processes", **ROLES}.items():
        values = [one.get(f"own.{role}", 0.0) / MIB for one in samples]
        if any(values):
            axes.plot(minutes, values, label=name)
    if fit := line(samples, "own.all"):
        first = minutes[-1] - 60 * fit.hours
        ends = [fit.start / MIB, (fit.start + fit.grown) / MIB]
        axes.plot([first, minutes[-1]], ends, "k--", label="fitted line, all processes")
    axes.set(xlabel="minutes", ylabel="memory that no file backs, MiB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
