"""Top-nσ among what vLLM's samplers do to scores: behind penalties and grammars, where min-p is.

Checked on vLLM 0.32.0. Letters: R rows, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from steering.kernels.truncation import keep
from steering.wire import TOP_N_SIGMA


def asked(params: Any) -> float:
    """The n of a request's sampling parameters; 0: it asks for none."""
    args: Mapping[str, Any] = params.extra_args or {}
    return float(args.get(TOP_N_SIGMA, 0.0))


def _kept(scores: torch.Tensor, n: torch.Tensor, padded: torch.Tensor | None) -> torch.Tensor:
    if padded is not None:
        rows = scores.index_select(1, padded).masked_fill((n > 0)[:, None], -torch.inf)
        scores = scores.index_copy(1, padded, rows)
    return keep(scores, n)


class V1Truncation:
    """One of V1's logits processors; which request is in which row comes as changes.

    Args:
        padded: [P] int64 ids of the base's table that are no token, or None.
    """

    def __init__(self, padded: torch.Tensor | None) -> None:
        self._padded = padded
        self._asked: dict[int, float] = {}

    def is_argmax_invariant(self) -> bool:
        """Such processors run where a request is drawn from, behind the temperature."""
        return True

    def update_state(self, update: Any) -> None:
        """Takes in which requests came, left and moved; None: none."""
        if update is None:
            return
        for row in update.removed:
            self._asked.pop(row, None)
        for row, params, *_ in update.added:
            self._asked.pop(row, None)
            if n := asked(params):
                self._asked[row] = n
        for one, other, direction in update.moved:
            moved, replaced = self._asked.pop(one, None), self._asked.pop(other, None)
            if moved is not None:
                self._asked[other] = moved
            if replaced is not None and direction.name == "SWAP":
                self._asked[one] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, V] the scores, in place."""
        if self._asked:
            rows = torch.tensor([*self._asked], device=logits.device)
            n = torch.tensor([*self._asked.values()], device=logits.device)
            logits[rows] = _kept(logits[rows], n, self._padded)
        return logits


class V2Truncation:
    """One of V2's logits processors; requests have slots.

    Args:
        padded: [P] int64 ids of the base's table that are no token, or None.
        slots: how many there are.
    """

    def __init__(self, padded: torch.Tensor | None, slots: int) -> None:
        self._padded = padded
        self._asked = np.zeros(slots, np.float32)

    def add_request(self, slot: int, params: Any) -> bool:
        """A request has got a slot; whether its scores are changed."""
        self._asked[slot] = asked(params)
        return bool(self._asked[slot])

    def apply_staged_writes(self) -> None:
        """Nothing waits on the host."""

    def apply(self, logits: torch.Tensor, step: Any) -> torch.Tensor:
        """[R, V] the scores.

        Args:
            logits: [R, V] float32.
            step: vLLM's context of the step.
        """
        if not self._asked[step.idx_mapping_np].any():
            return logits
        n = torch.from_numpy(self._asked.copy()).to(logits.device)[step.expanded_idx_mapping.long()]
        return _kept(logits, n, self._padded)
