"""Rules over layers in torch, float32; `steering.kernels.reference` has the float64 definitions.

Letters: n rows, V the base's vocabulary, S streams (base first), of which taps have negative
coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from steering.kernels.mix import NEVER
from steering.kernels.reference import EVOLUTION_STEPS, SET_BACK

Tap = Callable[[], torch.Tensor]
"""Gives a tap's scores, [n, V] float32; anything in rows that do not use it."""


class Contrast(NamedTuple):
    """What n rows are contrasted with."""

    coef: torch.Tensor
    """[n, S] the coefficients, 0 for taps that were not chosen."""
    shift: torch.Tensor
    """[n] what makes the sum of raw scores the same sum of log-probabilities."""


def contrast(
    base: torch.Tensor, taps: Sequence[Tap | None], coef: torch.Tensor, jsd: torch.Tensor
) -> Contrast:
    """Chooses each row's tap: the one whose distribution differs most from the base's.

    Args:
        base: [n, V] float32; −∞ on ids that no distribution has.
        taps: [S] where a stream has scores; the base's is not asked for.
        coef: [n, S] float32.
        jsd: [n] bool, by which divergence.
    """
    mass = base.logsumexp(-1, keepdim=True)
    final, rows = base - mass, coef.shape[0]
    most = torch.full((rows,), NEVER, device=base.device)
    chosen = torch.zeros(rows, dtype=torch.int64, device=base.device)
    shift = torch.zeros(rows, device=base.device)
    # On a CPU the host sees whether there is a choice; elsewhere it would have to wait.
    choice = coef.device.type != "cpu" or bool(((coef < 0).sum(-1) > 1).any())
    for i, tap in enumerate(taps):
        if i == 0 or tap is None:
            continue
        s = torch.where(base == NEVER, NEVER, tap())
        own = s.logsumexp(-1, keepdim=True)
        found = divergence(final, s - own, jsd) if choice else torch.zeros_like(most)
        better = (coef[:, i] < 0) & (found > most)
        most = torch.where(better, found, most)
        chosen = torch.where(better, i, chosen)
        shift = torch.where(better, -coef[:, i] * own[:, 0], shift)
    shift = shift - coef[:, 0] * mass[:, 0]
    kept = (coef >= 0) | (chosen[:, None] == torch.arange(coef.shape[1], device=coef.device))
    return Contrast(torch.where(kept, coef, 0.0), shift)


def divergence(p: torch.Tensor, q: torch.Tensor, jsd: torch.Tensor) -> torch.Tensor:
    """[n] nats between [n, V] log-probabilities, which are −∞ on the same ids."""
    known = p > NEVER
    mean = torch.logaddexp(p, q) - math.log(2)
    found = mean.exp() * (2 * mean - p - q)
    if jsd.device.type != "cpu" or jsd.any():  # elsewhere the host would have to wait
        textbook = p.exp() * (p - mean) + q.exp() * (q - mean)
        found = torch.where(jsd[:, None], textbook, found)
    return torch.where(known, found, 0.0).sum(-1) / 2


def evolved(
    base: torch.Tensor,
    taps: Sequence[Tap | None],
    coef: torch.Tensor,
    rate: torch.Tensor,
    top_k: torch.Tensor,
    most: int,
) -> torch.Tensor:
    """[n, V] the base's scores after the steps of `reference.evolved`; nothing asks the device.

    Args:
        base: [n, V] float32; −∞ on ids that no distribution has.
        taps: [S] where a stream has scores; the base's is not asked for.
        coef: [n, S] float32.
        rate: [n] float32.
        top_k: [n] float32.
        most: the largest `top_k` of any row.
    """
    known = base > NEVER
    best = base.topk(min(most, base.shape[1])).values
    place = top_k.long().clamp(1, best.shape[1]) - 1
    # Where fewer ids are known than are kept, all of them are.
    inside = known & (base >= best.gather(-1, place[:, None]))
    latent = torch.zeros_like(base)
    for i, tap in enumerate(taps):
        if i == 0 or tap is None:
            continue
        s = torch.where(known, tap(), NEVER)
        cosines = _cosines(torch.where(known, s - base, 0.0), s.softmax(-1))
        counted = inside & (coef[:, i : i + 1] < 0)
        latent += torch.where(counted, cosines.clamp(min=0).square(), 0.0)
    total = latent.sum(-1, keepdim=True)
    latent = torch.where(total > 0, latent / total, 0.0)
    z = base
    for t in range(EVOLUTION_STEPS):
        step = rate[:, None] * (1 - t / EVOLUTION_STEPS)
        z = z - step * (z.softmax(-1) - latent)
    least = z.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
    back = SET_BACK + z.amax(-1, keepdim=True) - least
    return torch.where(inside | ~known, z, z - back)


def _cosines(change: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[n, V] the cosine of `change` and p − e_i for each id i, from sums over the vocabulary."""
    along = (change * p).sum(-1, keepdim=True) - change
    towards = p.square().sum(-1, keepdim=True) - 2 * p + 1
    length = change.square().sum(-1, keepdim=True).sqrt() * towards.clamp(min=0).sqrt()
    return torch.where(length > 0, along / length, 0.0)
