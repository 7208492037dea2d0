"""What a soak promises, and whether it was so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import theilslopes

from load_tests.load_report import Checked

MIB = 1 << 20
WARM_UP = 1 / 3
"""Share of the time in which allocators and caches may still take what they need."""

SHORT_HOURS = 0.9
SHORT_GROWTH_MIB = 32.0
"""Shorter soaks are warm-up from end to end: vLLM's layers still compile products for numbers of
tokens that come for the first time. Ten minutes were measured at +7 MiB; they show fast leaks."""

GROWTH_MIB = 16.0
GROWTH_MIB_PER_HOUR = 16.0
"""What the memory of all processes may have grown by after the warm-up: the first, which is what
allocators keep or give back at random, and the second for each hour."""

MORE_FDS = 8
MORE_THREADS = 2
"""Medians of the last third over those of the second: connections come and go."""


@dataclass(frozen=True)
class Line:
    """A line through samples: the median of the slopes of all pairs, which spikes do not bend.

    Args:
        per_hour: slope.
        low, high: its 95 % interval, as if samples were independent.
        hours: between the first and the last sample.
        start: of the line, at the first sample.
    """

    per_hour: float
    low: float
    high: float
    hours: float
    start: float

    @property
    def grown(self) -> float:
        """Over all of the line."""
        return self.per_hour * self.hours


def line(samples: Sequence[Mapping[str, float]], figure: str) -> Line | None:
    """Through what follows the warm-up; None for fewer than five samples."""
    late = after_warm_up(samples)
    if len(late) < 5:
        return None
    hours = np.array([(one["at"] - late[0]["at"]) / 3600 for one in late])
    # All pairs: 1,000 samples are plenty.
    step = 1 + len(late) // 1000
    slope, start, low, high = theilslopes([one[figure] for one in late[::step]], hours[::step])
    return Line(float(slope), float(low), float(high), float(hours[-1]), float(start))


def after_warm_up(samples: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The samples of the last two thirds."""
    if not samples:
        return []
    begin, end = samples[0]["at"], samples[-1]["at"]
    return [one for one in samples if one["at"] >= begin + WARM_UP * (end - begin)]


def judged(found: Mapping[str, Any]) -> list[Checked]:
    """All promises.

    Args:
        found: the figures, see `load_tests.soak.__main__`.
    """
    return [*_answers(found), *_memory(found), *_end(found)]


def _none(says: str, some: Sequence[Any], shown: int = 3) -> Checked:
    text = "none" if not some else f"{len(some)}: " + "; ".join(str(one) for one in some[:shown])
    return Checked(says, text[:400], not some)


def _answers(found: Mapping[str, Any]) -> list[Checked]:
    counts: Mapping[str, Mapping[str, int]] = found["counts"]
    total: Counter[str] = Counter()
    for outcomes in counts.values():
        total.update(outcomes)
    checked = found["rechecked"]
    missing = [kind for kind in found["expected_kinds"] if kind not in counts]
    return [
        Checked("no answer is wrong", f"{total['wrong']} of {total['right']:,} compared at once",
                total["wrong"] == 0 and total["right"] > 0),
        Checked("no sampled answer that was computed again is wrong",
                f"{len(checked['wrong'])} of {checked['answers']:,} ({checked['tokens']:,} tokens)",
                not checked["wrong"] and checked["answers"] > 0),
        _none("no request fails, or is answered otherwise than it should be",
              [f"{f['kind']}: {f.get('why') or f.get('status')}" for f in found["failures"]]),
        _none("kinds of requests that were never made", missing),
        _none("looks at the server, or at its clients, that found something wrong",
              found["problems"]),
    ]  # fmt: skip


def _memory(found: Mapping[str, Any]) -> list[Checked]:
    samples: Sequence[Mapping[str, float]] = found["samples"]
    fit = line(samples, "own.all")
    if fit is None:
        return [Checked("memory is flat", "too few samples", False)]
    grown = fit.grown / MIB
    allowed = GROWTH_MIB + GROWTH_MIB_PER_HOUR * fit.hours
    says = (
        f"memory is flat after the first third: grown by at most {GROWTH_MIB:g} MiB and "
        f"{GROWTH_MIB_PER_HOUR:g} MiB per hour (here {allowed:.0f} MiB)"
    )
    if samples[-1]["at"] - samples[0]["at"] < SHORT_HOURS * 3600:
        allowed = SHORT_GROWTH_MIB
        says = (
            f"too short for the promise that memory is flat: after the first third it has grown "
            f"by at most {allowed:g} MiB"
        )
    out = [Checked(says, f"{grown:+.1f} MiB in {fit.hours * 60:.0f} minutes", grown <= allowed)]
    late = after_warm_up(samples)
    half = len(late) // 2
    for figure, says, more in (
        ("fds.all", "file descriptors do not accumulate", MORE_FDS),
        ("threads.all", "threads do not accumulate", MORE_THREADS),
    ):
        before, after = (median(one[figure] for one in some) for some in (late[:half], late[half:]))
        out.append(
            Checked(f"{says}: at most {more} more in the last third than in the second",
                    f"{before:g}, then {after:g}", after - before <= more)
        )  # fmt: skip
    return out


def _end(found: Mapping[str, Any]) -> list[Checked]:
    end: Mapping[str, Any] = found["end"]
    if "idle" not in end:
        return [Checked("the server ends in order", "the soak could not be ended in order", False)]
    idle = end["idle"]
    busy = {k: idle[k] for k in ("running", "waiting", "in_flight", "kv_used", "staging")}
    tests: list[tuple[str, str, Callable[[], bool]]] = [
        ("after the last request nothing runs, waits or holds blocks of the cache", str(busy),
         lambda: not any(busy.values())),
        ("after all adapters are unloaded the engine holds none",
         f"{end['engine']['taken']} sets, {end['engine']['bytes']} bytes",
         lambda: end["engine"]["taken"] == end["engine"]["bytes"] == 0),
        ("and the registry records none", str(end["recorded"]), lambda: not end["recorded"]),
        ("and the store has only contents that were loaded, none half-written",
         f"{len(end['digests'])}, {len(end['strange'])} strange, {end['staging']:g} half-written",
         lambda: not end["strange"] and end["staging"] == 0),
        ("the server ends with status 0, in order", f"status {end['status']}, {end['last_line']!r}",
         lambda: end["status"] == 0 and "ended in order" in end["last_line"]),
        ("no process of it is left", str(end["left"]), lambda: not end["left"]),
        ("its log has no traceback", f"{end['tracebacks']}", lambda: end["tracebacks"] == 0),
    ]  # fmt: skip
    return [Checked(says, value, met()) for says, value, met in tests]
