"""The soak: mixed requests against a real server for hours; answers compared, memory watched.

    python -m load_tests.soak                           # `make soak`: docs/reports/soak.md
    python -m load_tests.soak --minutes 10 --out /tmp/soak.md

Starts a server with the demo zoo in float32 and, in Locust, tenants and administrators
(`load_tests/locustfile.py`). A line a minute says how it goes; Ctrl-C ends it early, and the report
is written all the same. The report FILE.md comes with a folder FILE that has the plot and all
figures. The exit status is 1 if a promise was not kept (`load_tests/soak/verdict.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from load_tests.load_report import machine
from load_tests.soak.ending import end
from load_tests.soak.kinds import KINDS
from load_tests.soak.oracle import Oracle, references
from load_tests.soak.report import latencies, page, plot
from load_tests.soak.samples import check
from load_tests.soak.stage import ENGINE, ROOT, SLOTS, configuration, copy_adapters, digests
from load_tests.soak.tally import Tally
from load_tests.soak.verdict import MIB, judged
from load_tests.soak.watch import Watch
from tests.server.live import Server

ADMINISTRATORS = 4
STOP_S = 120
"""How long Locust's users may finish what they do."""
OTHER_KINDS = (
    "refused with 400", "refused with 404", "refused with 413", "stream left by its client",
    "connection closed in the answer", "connection closed in the request", "adapters: load",
    "adapters: replace", "adapters: unload", "adapters: pin", "adapters: unpin",
    "adapters: replace by a spoiled one", "adapters: load or replace, contested",
)  # fmt: skip


class Soak:
    """One soak.

    Args:
        folder: for everything that is written meanwhile; empty.
        minutes: how long.
        users: tenants.
        every_s: between two looks at the server.
        samples: sampled answers of each kind that are computed again.
    """

    def __init__(
        self, folder: Path, minutes: float, users: int, every_s: float, samples: int
    ) -> None:
        self._folder, self._minutes, self._users = folder, minutes, users
        self._every_s, self._samples = every_s, samples
        self._locust: subprocess.Popen[bytes] | None = None
        self._interrupted = False
        self._tally = Tally(folder / "requests.jsonl")

    def interrupt(self, *_: Any) -> None:
        """Ends it early; the second time at once, without a report."""
        if self._interrupted or self._locust is None:
            raise KeyboardInterrupt
        self._interrupted = True
        self._locust.terminate()

    def run(self) -> dict[str, Any]:
        """The figures."""
        sources = copy_adapters(self._folder)
        config = configuration(self._folder)
        oracle = Oracle(config, self._folder / "adapters")
        known = {**_with_bar("references", lambda say: references(oracle, say)), "sources": sources}
        (self._folder / "references.json").write_text(json.dumps(known))
        server = Server(self._folder, config)
        found: dict[str, Any] = {"problems": [], "end": {}}
        try:
            server.wait_ready()
            state = self._folder / "state"
            watch = Watch(server.process.pid, server.url, state, server.log, self._every_s)
            begin = time.time()
            found["problems"] += self._ask(server, watch)
            found["begin"], found["seconds"] = begin, time.time() - begin
            found["samples"] = watch.samples
            found["problems"] += watch.problems
            if server.process.poll() is None:
                try:
                    found["end"] = end(server, watch, state, digests(sources))
                except Exception as error:  # the report must tell it
                    found["problems"].append(f"at the end: {type(error).__name__}: {error}")
        finally:
            server.stop(signal.SIGKILL)
        return found | self._figures(oracle, found) | {"references": len(known["expected"])}

    def _ask(self, server: Server, watch: Watch) -> list[str]:
        """The users' part; what went wrong with them."""
        command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--headless"]
        command += ["--host", server.url, "-u", str(self._users + ADMINISTRATORS), "-r", "2"]
        command += ["-t", f"{self._minutes * 60:.0f}s", "--stop-timeout", str(STOP_S)]
        environ = {
            **os.environ,
            # A proxy that the environment names must not stand between users and server.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "COXSWAIN_SOAK_FOLDER": str(self._folder),
            "COXSWAIN_SOAK_SAMPLES": str(self._samples),
        }
        log = self._folder / "locust.txt"
        problems = []
        with log.open("w") as out:
            # A session of its own: Ctrl-C is for us, and we tell it.
            self._locust = subprocess.Popen(
                [*command, "--only-summary"], cwd=ROOT, env=environ, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        watch.start()
        limit = time.monotonic() + self._minutes * 60 + 3 * STOP_S
        spoken = time.monotonic()
        while self._locust.poll() is None:
            time.sleep(0.5)
            if server.process.poll() is not None or time.monotonic() > limit:
                problems.append(f"server: status {server.process.poll()}; Locust is ended")
                self._locust.kill()
                self._locust.wait()
            if time.monotonic() > spoken + 60:
                spoken = time.monotonic()
                self._say(watch)
        watch.end()
        self._tally.update()
        if self._locust.returncode and not self._tally.failures:
            problems.append(f"Locust ended with {self._locust.returncode}: {_tail(log)}")
        if server.process.poll() is not None:
            problems.append(f"the server's log ends: {_tail(server.log)}")
        return problems

    def _say(self, watch: Watch) -> None:
        self._tally.update()
        last = watch.samples[-1] if watch.samples else {}
        print(
            f"{time.strftime('%H:%M:%S')} {self._tally.total():,} requests, "
            f"{self._tally.total('wrong')} wrong, {self._tally.total('failed')} failed; "
            f"{last.get('own.all', 0) / MIB:.0f} MiB, "
            f"{last.get('fds.all', 0):.0f} files, {last.get('set_evictions', 0):.0f} evictions",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def _figures(self, oracle: Oracle, found: dict[str, Any]) -> dict[str, Any]:
        tally, file = self._tally, self._folder / "samples.json"
        samples = json.loads(file.read_text()) if file.exists() else []
        checked = _with_bar("sampled answers", lambda say: check(oracle, samples, say))
        begin = found["begin"]
        complete = not self._interrupted and self._minutes >= 3
        return {
            "asked_minutes": self._minutes,
            "interrupted": self._interrupted,
            "users": self._users,
            "slots": SLOTS,
            "engine": ENGINE,
            "machine": machine(),
            "counts": {kind: dict(one) for kind, one in tally.counts.items()},
            "expected_kinds": [*(kind.name for kind in KINDS), *OTHER_KINDS] if complete else [],
            "failures": tally.failures,
            "tokens": tally.tokens,
            "worst": tally.worst,
            "rechecked": asdict(checked),
            "latencies": latencies(tally.records(), begin, begin + found["seconds"]),
        }


def _with_bar(what: str, work: Callable[[Callable[[float], None]], Any]) -> Any:
    with tqdm(total=1.0, desc=what, bar_format="{desc}: {percentage:3.0f}% {elapsed}",
              file=sys.stderr, mininterval=2.0) as bar:  # fmt: skip
        return work(lambda share: bar.update(share - bar.n) and None)


def _tail(file: Path) -> str:
    return file.read_text()[-1500:]


def write(found: dict[str, Any], out: Path) -> None:
    """The report, and its folder."""
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(_columns(found), indent=1) + "\n")
    if found["samples"]:
        plot(found["samples"], folder / "memory.svg")
    out.write_text(page(found, folder.name))


def _columns(found: dict[str, Any]) -> dict[str, Any]:
    """The figures with the samples as columns, which is a tenth of the lines."""
    names = sorted({name for one in found["samples"] for name in one})
    columns = {n: " ".join(f"{one.get(n, 0):.6g}" for one in found["samples"]) for n in names}
    begin = found["begin"]
    columns["at"] = " ".join(f"{one['at'] - begin:.1f}" for one in found["samples"])
    return {**found, "samples": columns}


def read(out: Path) -> dict[str, Any]:
    """The figures of a report that was written before."""
    found: dict[str, Any] = json.loads((out.with_suffix("") / "figures.json").read_text())
    columns = {name: map(float, line.split()) for name, line in found["samples"].items()}
    rows = zip(*columns.values(), strict=True)
    found["samples"] = [dict(zip(columns, row, strict=True)) for row in rows]
    for one in found["samples"]:
        one["at"] += found["begin"]
    return found


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.soak", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=120, help="how long (default 120)")
    parser.add_argument("--users", type=int, default=8, help="tenants (default 8)")
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks (5)")
    parser.add_argument(
        "--samples", type=int, default=12, help="sampled answers computed again, of each kind (12)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "reports" / "soak.md", help="the report"
    )
    parser.add_argument("--render", action="store_true", help="the report again, from its figures")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if args.render:
        return report(read(args.out), args.out)
    with tempfile.TemporaryDirectory(prefix="coxswain-soak-") as folder:
        soak = Soak(Path(folder), args.minutes, args.users, args.every, args.samples)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, soak.interrupt)
        found = soak.run()
    return report(found, args.out)


def report(found: dict[str, Any], out: Path) -> int:
    """Writes the report and says what was kept; the exit status."""
    write(found, out)
    promises = judged(found)
    for one in promises:
        print(f"{'kept' if one.met else 'BROKEN'}: {one.says}: {one.value}")
    print(f"report: {out}")
    return 0 if all(one.met for one in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
