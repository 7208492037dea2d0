"""Marks the rows of a step whose drawn token is reported, and measures them after the read-out.

Lives in the worker; one instance per steered model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steering.plan import BASE, CRITICAL_KINDS, RuleKind
from steering.worker import heads
from steering.worker.adapting import Routed
from steering.worker.batches import Schedule
from steering.worker.layout import REPORT, Layout
from steering.worker.readout import Mixed, Reading
from steering.worker.report import Marked, ReportBook, choice_of
from steering.worker.request_state import BatchTables
from steering.worker.watch import Watch

Choices = Callable[..., dict[int, dict[int, tuple[int, float]]]]
"""`Readout.choices` of the step's hidden states and streams, but for `rows` and `size`."""


@dataclass
class Reporter:
    """Fills the reports of requests that ask for one.

    Args:
        names: of the streams that run, base first.
        layout: of the hidden states.
        readings: heads by name, and what they read.
    """

    names: tuple[str, ...]
    layout: Layout
    readings: dict[str, Reading]
    book: ReportBook = field(default_factory=ReportBook)
    _marked: list[Marked] = field(default_factory=list)

    def mark(
        self,
        view: Any,
        tables: BatchTables,
        schedule: Schedule,
        control: npt.NDArray[np.float32],
    ) -> None:
        """Marks this step's rows in `control`, and settles the tokens that were drawn before."""
        self._marked = []
        ids = schedule.request_ids
        for row, state in tables.reported:
            choice = choice_of(ids[row])
            tally = self.book.tally(state.tag, choice)
            if tally.waiting:
                tally.settle(view.drawn(row, tally.waiting[0].row.place))
            if not schedule.draws[row]:
                continue
            tally.run(n for n, used in zip(self.names, state.uses, strict=True) if used)
            tally.run(name for name, _ in (state.values.strengths if state.values else ()))
            drafts, last = int(schedule.drafts[row]), int(schedule.starts[row + 1]) - 1
            tally.drafted += drafts
            end = int(schedule.computed[row] + schedule.lengths[row])
            for back in range(drafts, -1, -1):
                draft = view.token(row, end - back) if back else None
                marked = Marked(state.tag, choice, end - back, draft, state.heads, state.tokens)
                self._marked.append(marked)
                control[last - back, len(self.names) + REPORT] = len(self._marked)

    def forget(self) -> None:
        """A step without rows that report."""
        self._marked = []

    @property
    def waits(self) -> bool:
        """Whether a row of this step reports."""
        return bool(self._marked)

    def routes(self, ids: Sequence[str], tables: BatchTables, routed: Sequence[Routed]) -> None:
        """Counts where the tokens of a step were routed."""
        for stream, digest, counts in routed:
            for row, state in tables.reported:
                if any(u.stream == stream and u.digest == digest for u in state.adapters):
                    tally = self.book.tally(state.tag, choice_of(ids[row]))
                    tally.route(stream, digest, counts[row].tolist())

    def measure(
        self, mixed: Mixed | None, hidden: torch.Tensor, choices: Choices, watch: Watch
    ) -> None:
        """Measures the marked rows; on ranks that hold no logits it only takes part.

        Args:
            mixed: R rows of scores; None on ranks that hold none.
            hidden: [R, width] what they were made of.
            choices: tells what the streams by themselves would have chosen.
            watch: told of every head's number.
        """
        control = self.layout.read_control(hidden)
        marks, requests = enumerate(control.report.tolist()), control.request.tolist()
        rows = {row: self._marked[int(mark) - 1] for row, mark in marks if mark}
        detailed = [row for row, marked in rows.items() if marked.tokens]
        size = 0 if mixed is None else mixed.base.shape[-1]
        own = choices(rows=detailed, size=size) if detailed else {}
        if mixed is None:
            return
        asked = {row: marked.heads for row, marked in rows.items()}
        told = heads.read(self.readings, self.layout, hidden, asked)
        for row, said in told.items():
            for name, number in said["heads"].items():
                watch.told(name, number, int(requests[row]) - 1)
        for row, marked in rows.items():
            steered, plain = (s[row].float().log_softmax(-1) for s in (mixed.z, mixed.base))
            more = _critical_of(mixed, row) | told.get(row, {})
            if marked.tokens:
                streams = {self.names[i]: pair for i, pair in own[row].items()}
                more["choices"] = {BASE: _choice(plain), **streams}
            tally = self.book.tally(marked.tag, marked.choice)
            tally.add(steered, plain, marked, more)


def _critical_of(mixed: Mixed, row: int) -> dict[str, Any]:
    """What a report says of a critical-token row; nothing of others."""
    kind = int(mixed.control.kind[row])
    if kind not in CRITICAL_KINDS or mixed.critical is None:
        return {}
    probability = float(mixed.critical[row].sigmoid())
    found: dict[str, Any] = {"critical_probability": probability}
    if kind == RuleKind.CRITICAL:
        found["critical"] = probability > float(mixed.control.param[row])
    return found


def _choice(logprobs: torch.Tensor) -> tuple[int, float]:
    """The most likely id and its log-probability, of [V]."""
    best = logprobs.max(-1)
    return int(best.indices), float(best.values)
