"""Rows that set all ids but their candidates back: what value streams add decides among few."""

from __future__ import annotations

import torch

from steering.kernels.mix import NEVER
from steering.kernels.reference import SET_BACK
from steering.worker.plan.layout import CANDIDATES_ONLY, Control


def only_candidates(z: torch.Tensor, control: Control) -> torch.Tensor:
    """[R, V] the scores with masked rows' other ids `SET_BACK` below all their candidates.

    Nothing waits for the device.

    Args:
        z: [R, V] float32, with what is added to it.
        control: of its rows.
    """
    masked = (control.options.clamp(0, 127).long() & CANDIDATES_ONLY) > 0
    ids = control.ids.long().clamp(0, z.shape[-1] - 1)
    kept = torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, True)
    least = z.masked_fill(z == NEVER, torch.inf).amin(-1, keepdim=True)
    back = SET_BACK + z.amax(-1, keepdim=True) - least
    return torch.where(masked[:, None] & ~kept, z - back, z)
