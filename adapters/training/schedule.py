"""The learning rate: rises, then falls as a cosine."""

from __future__ import annotations

import math


def rate_share(step: int, steps: int, warm_up: float) -> float:
    """Share of the highest rate, 0 to 1; of the step alone, so nothing is to restore.

    Args:
        step: from 0.
        steps: of the whole run.
        warm_up: share of the steps in which it rises, at least one step.
    """
    warm = max(1, round(warm_up * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
