"""Steps as vLLM might schedule them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steering.worker.plan.batches import Schedule


def scheduled(starts: Sequence[int], computed: Sequence[int]) -> Schedule:
    """A step of requests that all draw a token."""
    count = len(computed)
    return Schedule(
        [str(q) for q in range(count)],
        np.array(starts, np.int32),
        np.array(computed, np.int32),
        np.ones(count, bool),
        np.zeros(count, np.int32),
    )
