"""The ids that end a text, request by request: the base's, and the request's own stop ids.

Lives in the worker. Letters: V the base's vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from steering.kernels.mix import BLOCK, Ends
from steering.worker.plan.staging import to_device

Own = tuple[int, ...]
"""Stop ids of a request that the base does not end a text with, in order."""


class EndSets:
    """The sets of a step's rows, as one table.

    Args:
        base: ids at which the base ends a text.
        size: V.
    """

    def __init__(self, base: Iterable[int], size: int) -> None:
        self._base, self._size = frozenset(base), size
        self._shown: tuple[Own, ...] = ((),)
        self._table: torch.Tensor | None = None

    def own(self, stops: Iterable[int]) -> Own:
        """What a request's stop ids add to the base's."""
        return tuple(sorted({i for i in stops if 0 <= i < self._size} - self._base))

    def show(self, sets: Sequence[Own]) -> None:
        """Makes the sets of a step known: a row's control says which it has."""
        if tuple(sets) != self._shown:
            self._shown, self._table = tuple(sets), None

    def of(self, which: torch.Tensor) -> Ends | None:
        """The sets of R rows; None if nothing ends a text.

        Args:
            which: [R] float32, the number of each row's set in what was shown last.
        """
        if not self._base and not any(self._shown):
            return None
        if self._table is None or self._table.device != which.device:
            # Whole blocks, as the Triton kernels read them.
            table = np.zeros((len(self._shown), -(-self._size // BLOCK) * BLOCK), np.bool_)
            for line, own in zip(table, self._shown, strict=True):
                line[[*(i for i in self._base if i < self._size), *own]] = True
            (self._table,) = to_device([table], which.device)
        return Ends(self._table, which)
