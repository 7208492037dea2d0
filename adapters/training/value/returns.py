"""What a value model shall say: targets of TD(λ), and how much of the returns it explains.

A reply of L tokens has the states s_0 … s_L: the prompt, then one token more each. Its reward r
comes at the end, so the return after s_t is γ^(L−t) r. Letters: B replies, S ≥ L + 1 states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def targets(
    values: Tensor, lengths: Tensor, rewards: Tensor, *, gamma: float, lambda_: float
) -> Tensor:
    """The λ-returns: G_L = r, and for t < L, with V(s_L) := r,

        G_t = γ ((1 − λ) V(s_{t+1}) + λ G_{t+1})

    (Sutton and Barto, 2nd edition, section 12.1.)

    Args:
        values: V, [B, S] float; what stands behind a row's L is not read.
        lengths: L, [B] int64, 0 to S − 1.
        rewards: r, [B] float.
        gamma: γ, 0 to 1.
        lambda_: λ, 0 to 1.

    Returns:
        [B, S] float without gradient; behind L it is r.
    """
    at = torch.arange(values.shape[1], device=values.device)
    ended = at >= lengths[:, None]
    known = torch.where(ended, rewards[:, None], values.detach())
    found = known.clone()
    for t in range(values.shape[1] - 2, -1, -1):
        mixed = gamma * ((1 - lambda_) * known[:, t + 1] + lambda_ * found[:, t + 1])
        found[:, t] = torch.where(ended[:, t], rewards, mixed)
    return found


def explained(values: Tensor, returns: Tensor) -> float | None:
    """1 − Var(return − value) / Var(return); None where all returns are the same.

    Args:
        values: [N] float.
        returns: [N] float.
    """
    spread = returns.double().var(correction=0)
    if not spread > 0:
        return None
    return float(1 - (returns.double() - values.double()).var(correction=0) / spread)
