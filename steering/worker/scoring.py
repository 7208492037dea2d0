"""The scores of a step: which rows a call of `compute_logits` has, who reports, whom to watch.

Lives in the worker; one instance per steered model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steering.worker.readout import Readout
from steering.worker.reporter import Reporter, StagedReport, StepReport, stage_rows
from steering.worker.rows import DrawRows
from steering.worker.step_plan import Classes, StepPlan


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

    def begin(self, plan: StepPlan | None) -> None:
        """A new step; None: one of vLLM's dummy runs, about whose rows nothing is known."""
        self._plan = plan
        self._drawing = None if plan is None else DrawRows.of(plan.schedule)
        if plan is not None:
            self.readout.watch.begin_step(len(plan.schedule.request_ids))
            self.readout.ends.show(plan.tables.ends)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[R, V] scores; None on ranks that hold none.

        The first call of a step has the rows that draw; later ones are of prompts.

        Args:
            hidden: [R, H_0] of a step of the base alone, else [R, layout.width].
        """
        drawing, self._drawing = self._drawing, None
        if drawing is None or self._plan is None:
            return self._scores(hidden, None)
        watch = self.readout.watch
        scored = [unembed is not None for unembed in self.readout.unembed]
        report = StepReport.of(self._plan, drawing, scored)
        table, staged = stage_rows(drawing, report, hidden.device)
        watch.begin_rows(hidden.shape[0])
        z = self._scores(hidden, staged)
        watch.end_rows(table)
        return z

    def _scores(self, hidden: torch.Tensor, report: StagedReport | None) -> torch.Tensor | None:
        readout = self.readout
        if hidden.shape[-1] == readout.layout.sizes[0]:
            return readout.base(hidden)
        unknown = Classes.all(readout.layout.streams, len(readout.heads))
        classes = self._plan.classes if self._plan else unknown
        if classes.uniform_sum and report is None:
            z = readout.in_one(hidden, classes.active)
            if z is not None:
                return z
        mixed = readout(hidden, classes, None if report is None else report.rows)
        if mixed is None:
            return None
        if report is not None:
            self.reporter.measure(report, mixed, hidden, readout)
        return mixed.z
