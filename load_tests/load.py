"""The load tests: every scenario against its server, side by side, into one Markdown report.

    python -m load_tests.load                          # about 25 minutes on two quiet cores
    python -m load_tests.load --quick                  # about five
    python -m load_tests.load --only plain steered     # some scenarios
    python -m load_tests.load --add                    # further rounds to the figures in --out
    python -m load_tests.load --add --parts growth     # only how the cost grows, measured again
    python -m load_tests.load --render                 # the report again, from the figures in --out

All servers are up at the same time with the same models, and asked in turn, round by round, because
machines drift: ratios are taken within a round. The client is vLLM's own (`vllm bench serve`);
arrivals are open-loop. The report FILE.md comes with a folder FILE that has the plots and all
figures. The exit status is 1 if a limit in a scenario does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from load_tests import bench_client, growth
from load_tests.load_models import REAL, Shapes, write_models
from load_tests.load_report import checked, machine, page, plots
from load_tests.scenario import (
    Level,
    Scenario,
    ScenarioError,
    Traffic,
    load_scenarios,
    load_traffic,
)
from load_tests.targets import ENGINE, Targets

WARM = Level(rate=16.0, requests=6)
PARTS = ("loads", "growth")
QUICK_REQUESTS = 3
"""Most requests per level of a scenario that has a limit of its own, in the quick form."""


class Load:
    """The scenarios, measured.

    Args:
        folder: with the models.
        shapes: theirs.
        scenarios: what to ask, by name.
        traffic: what arrives.
        levels: the loads, by name.
        engine: vLLM's arguments over `targets.ENGINE`.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Shapes,
        scenarios: dict[str, Scenario],
        traffic: Traffic,
        levels: dict[str, Level],
        engine: dict[str, object],
    ) -> None:
        self._folder, self._scenarios = folder, scenarios
        self._traffic, self._levels = traffic, levels
        self._targets = Targets(folder, shapes, engine)

    def rounds(self, first: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rounds `first` to `first + count − 1`: scenario → level → figures.

        Every round asks other requests, and begins with another scenario. A round is given again
        after each of its runs, so that a run that is ended keeps what it has measured.
        """
        names = list(self._scenarios)
        total = count * len(names) * len(self._levels)
        with contextlib.ExitStack() as stack:
            urls = self._started(stack)
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            bar = stack.enter_context(tqdm(total=total, unit="run", file=sys.stderr))
            for name in tqdm(names, desc="warming up", leave=False, file=sys.stderr):
                self._run(name, WARM, urls, 0, log)
            for i in range(first, first + count):
                found: dict[str, Any] = {name: {} for name in names}
                for level, load in self._levels.items():
                    for name in names[i % len(names) :] + names[: i % len(names)]:
                        bar.set_description(f"round {i + 1}, {level}, {name}")
                        found[name][level] = self._run(name, load, urls, i + 1, log)
                        bar.update()
                        yield i, found

    def _started(self, stack: contextlib.ExitStack) -> dict[str, str]:
        targets = list(dict.fromkeys(one.target for one in self._scenarios.values()))
        urls = {}
        for target in (bar := tqdm(targets, desc="starting", leave=False, file=sys.stderr)):
            bar.set_description(f"starting {target}")
            urls[target] = stack.enter_context(self._targets.running(target))
        return urls

    def _run(
        self, name: str, level: Level, urls: dict[str, str], seed: int, log: Any
    ) -> bench_client.Figures:
        own = self._scenarios[name]
        url, tokenizer = urls[own.target], self._folder / "base"
        return bench_client.run(own, self._traffic, level, url, tokenizer, seed, log)


def measured(args: argparse.Namespace, found: dict[str, Any], figures: Path) -> None:
    """Adds to the results, and saves them after each round."""
    if "loads" in args.parts:
        loaded(args, found, figures)
    if "growth" in args.parts:
        found["growth"] = growth.run(args.quick, 1 if args.quick else 3)
        save(found, figures)


def loaded(args: argparse.Namespace, found: dict[str, Any], figures: Path) -> None:
    """Adds rounds of the scenarios."""
    traffic, scenarios = load_traffic(), load_scenarios()
    chosen = {name: scenarios[name] for name in args.only or scenarios}
    levels = traffic.quick if args.quick else traffic.levels
    if args.quick:
        chosen = {
            name: one.model_copy(update={"requests": QUICK_REQUESTS}) if one.requests else one
            for name, one in chosen.items()
        }
    engine: dict[str, object] = {"enforce_eager": True} if args.quick else {}
    with contextlib.ExitStack() as stack:
        folder = args.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = write_models(folder, REAL)
        found.setdefault("rounds", [])
        found |= {
            "machine": machine(),
            "models": {"parameters": sizes, "base": REAL.base, "companion": REAL.companion}
            | {"vocabulary": REAL.vocabulary, "adapters": REAL.adapters},
            "engine": ENGINE | engine,
            "traffic": traffic.model_dump(exclude={"quick", "levels"}),
            "levels": {name: level.model_dump() for name, level in levels.items()},
            "scenarios": found.get("scenarios", {})
            | {name: one.model_dump() for name, one in chosen.items()},
        }
        load = Load(folder, REAL, chosen, traffic, levels, engine)
        for i, one in load.rounds(len(found["rounds"]), args.rounds):
            found["rounds"][i:] = [one]
            save(found, figures)


def save(found: dict[str, Any], figures: Path) -> None:
    """Writes all figures as JSON."""
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.write_text(json.dumps(found, indent=1) + "\n")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("load-report.md"), help="the report")
    parser.add_argument("--rounds", type=int, help="how often to repeat (default 2; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="few requests, two levels, eager")
    parser.add_argument(
        "--models", type=Path,
        help="where to write the models (0.7 GB); in the same place again, vLLM finds what it has\n"
        "compiled for them (default: a temporary folder)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="some scenarios")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument("--note", help="what a reader must know of this measurement; kept with it")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--add", action="store_true", help="further rounds to the figures of --out")
    kept.add_argument("--render", action="store_true", help="only the report, measure nothing")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (1 if args.quick else 2)
    if "loads" not in args.parts and not (args.add or args.render):
        parser.error("--parts growth needs --add: the report is of the loads first")
    if unknown := set(args.only or ()) - set(load_scenarios()):
        parser.error(f"--only: {sorted(unknown)} is none of {list(load_scenarios())}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    try:
        args = parsed(arguments)
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return 2
    for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR")
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    folder = args.out.with_suffix("")
    figures = folder / "figures.json"
    kept = args.add or args.render
    found: dict[str, Any] = json.loads(figures.read_text()) if kept else {}
    if not args.render:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
        measured(args, found, figures)
    if args.note is not None:
        found["note"] = args.note
        save(found, figures)
    plots(found, folder)
    args.out.write_text(page(found, folder.name))
    print(f"{args.out}, with plots and all figures in {folder}", file=sys.stderr)
    missed = [one for one in checked(found) if not one.met]
    for one in missed:
        print(f"not met: {one.says}: {one.value}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
