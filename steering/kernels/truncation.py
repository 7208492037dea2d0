"""Top-nσ: only ids are drawn whose score is within n standard deviations of the largest.

Tang, Liu, Xu et al., "Top-nσ: Not All Logits Are You Need", arXiv 2411.07641: an id is kept if

    s ≥ max s − n σ

σ being the standard deviation of the scores over the vocabulary (their code: with V − 1). It does
not depend on the temperature. Ids that the scores rule out would make it infinite, so the scores
that count are those in play: finite, and above the first gap of more than `GAP` nats between one
score and the next lower one. Below it are ids that a rule has set back (`reference.SET_BACK`), or a
ban (`steering.bans`).

Letters: R rows, V the vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from steering.kernels.reference import SET_BACK, Scores

GAP = SET_BACK / 2
"""Nats. Wider than any gap among scores that a model gives; a rule's gap is twice as wide, which
leaves room for what a bias adds to an id."""


def kept_reference(scores: Scores, n: float) -> npt.NDArray[np.bool_]:
    """[V] bool: the ids that may be drawn.

    Args:
        scores: [V], at least one finite.
        n: > 0.
    """
    ranked = np.sort(scores[np.isfinite(scores)])[::-1]
    gaps = np.flatnonzero(ranked[:-1] - ranked[1:] > GAP)
    play = ranked[: gaps[0] + 1] if gaps.size else ranked
    deviation = play.std(ddof=1) if play.size > 1 else 0.0
    found: npt.NDArray[np.bool_] = scores >= max(play[0] - n * deviation, play[-1])
    return found


def keep(scores: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """The scores with −∞ in place of what may not be drawn. Nothing waits for the device.

    Args:
        scores: [R, V] float32.
        n: [R] float32; rows with 0 stay as they are.
    """
    ranked = scores.sort(-1, descending=True).values
    gap = ranked[:, :-1] - ranked[:, 1:]
    play = torch.ones_like(ranked, dtype=torch.bool)
    play[:, 1:] = (gap > GAP).cumsum(-1) == 0
    count = play.sum(-1, keepdim=True)
    # From the largest on: sums of scores with a large offset would lose digits.
    below = (ranked - ranked[:, :1]).masked_fill(~play, 0.0)
    mean = below.sum(-1, keepdim=True) / count
    square = (below - mean).masked_fill(~play, 0.0).square().sum(-1, keepdim=True)
    deviation = (square / (count - 1).clamp(min=1)).sqrt()
    floor = torch.maximum(-n[:, None] * deviation, below.amin(-1, keepdim=True))
    lost = (scores - ranked[:, :1] < floor) & (n > 0)[:, None]
    return scores.masked_fill(lost, -torch.inf)
