"""The scores of a step: which rows a call of `compute_logits` has, who reports, whom to watch.

Lives in the worker; one instance per steered model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from steering.worker.plan.staging import Staging
from steering.worker.plan.step_plan import Classes, StepPlan
from steering.worker.readout.readout import Readout
from steering.worker.readout.reporter import Reporter, StagedReport, StepReport
from steering.worker.readout.rows import DrawRows


@dataclass
class Scoring:
    """Reads steps out.

    Args:
        readout: of the steered model.
        reporter: measures what is reported.
    """

    readout: Readout
    reporter: Reporter
    _plan: StepPlan | None = None
    _drawing: DrawRows | None = None
    _table: torch.Tensor | None = None
    _report: StagedReport | None = None

    def begin(self, plan: StepPlan | None, staging: Staging) -> None:
        """A new step; None: one of vLLM's dummy runs, about whose rows nothing is known.

        Args:
            plan: of the step.
            staging: takes what the device must know of the rows. It is sent before they are read.
        """
        self._plan, self._table, self._report = plan, None, None
        self._drawing = None if plan is None else DrawRows.of(plan.schedule)
        if plan is None or self._drawing is None:
            return
        self.readout.watch.begin_step(len(plan.schedule.request_ids))
        self.readout.ends.show(plan.tables.ends)
        if not self._drawing.single:
            staging.add([self._drawing.table()], self._put_table)
        scored = [unembed is not None for unembed in self.readout.unembed]
        names = self.reporter.running
        if report := StepReport.of(plan, self._drawing, scored, names):
            staging.add(report.arrays(), partial(self._put_report, report))

    def _put_table(self, there: Sequence[torch.Tensor]) -> None:
        (self._table,) = there

    def _put_report(self, report: StepReport, there: Sequence[torch.Tensor]) -> None:
        self._report = StagedReport.of(report, there)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[R, V] scores; None on ranks that hold none.

        The first call of a step has the rows that draw; later ones are of prompts.

        Args:
            hidden: [R, H_0] of a step of the base alone, else [R, layout.width].
        """
        drawing, self._drawing = self._drawing, None
        if drawing is None:
            return self._scores(hidden, None)
        watch = self.readout.watch
        watch.begin_rows(hidden.shape[0])
        z = self._scores(hidden, self._report)
        watch.end_rows(self._table)
        return z

    def _scores(self, hidden: torch.Tensor, report: StagedReport | None) -> torch.Tensor | None:
        readout = self.readout
        if hidden.shape[-1] == readout.layout.sizes[0]:
            return readout.base(hidden)
        unknown = Classes.all(readout.layout.streams, len(readout.heads), bool(readout.taps))
        classes = self._plan.classes if self._plan else unknown
        if classes.uniform_sum and report is None:
            z = readout.in_one(hidden, classes.active)
            if z is not None:
                return z
        if report is None:
            mixed = readout(hidden, classes)
        else:
            mixed = readout(hidden, classes, report.rows, report.apart)
        if mixed is None:
            return None
        if report is not None:
            self.reporter.measure(report, mixed, hidden, readout)
        return mixed.z
