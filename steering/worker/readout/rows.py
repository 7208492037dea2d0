"""The rows of a step's first `compute_logits`, all known on the host: those that draw.

vLLM asks for the scores of each request in order: one row per draft that the step verifies, and
one more. Later calls in a step are of prompts, whose rows nobody here knows.

Lives in the worker. Letters: Q requests of this step, K drafts of the one that has most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steering.worker.plan.batches import Int64, Schedule


@dataclass(frozen=True, slots=True)
class DrawRows:
    """The rows of a step that draw.

    Args:
        starts: [Q + 1] where each request's rows start.
    """

    starts: Int64

    @classmethod
    def of(cls, schedule: Schedule) -> DrawRows:
        """Those of what vLLM scheduled."""
        starts = np.zeros(len(schedule.drafts) + 1, np.int64)
        np.cumsum(schedule.drafts + 1, out=starts[1:])
        return cls(starts)

    @property
    def single(self) -> bool:
        """Whether row q is request q's."""
        return int(self.starts[-1]) == self.starts.size - 1

    def rows(self, requests: Int64) -> Int64:
        """[n] the rows of one or more requests, one after the other."""
        return np.concatenate([np.arange(*self.starts[q : q + 2]) for q in requests])

    def table(self) -> Int64:
        """[Q, K + 1] the rows of each request, its last one repeated if it has fewer."""
        most = np.arange(np.diff(self.starts).max())
        return np.minimum(self.starts[:-1, None] + most, self.starts[1:, None] - 1)
