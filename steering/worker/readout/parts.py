"""What the read-out reads and makes: unembeddings, heads, vocabularies, scores.

Lives in the worker. Letters: R rows, V the base's vocabulary, S streams, H a hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from steering.kernels.mix import Measures

Unembed = Callable[[torch.Tensor], torch.Tensor | None]
"""[R, H] hidden states → [R, V] logits in the model's dtype (None on ranks that hold none)."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""[R, H] hidden states → [R] float32."""


class Reading(NamedTuple):
    """A head and the stream whose hidden states it reads."""

    stream: int
    head: Head


class Scores(NamedTuple):
    """A stream's own scores, as its unembedding leaves them."""

    rows: torch.Tensor | None
    """[n] int64 which of the R rows they are of, ascending; None: all."""
    own: torch.Tensor
    """[n, own V]."""

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of some of its rows, [m] int64."""
        return self.own[rows if self.rows is None else torch.searchsorted(self.rows, rows)]


class Mixed(NamedTuple):
    """R rows of scores, and what they were made of."""

    z: torch.Tensor
    """[R, V] float32 scores of the steered model."""
    base: torch.Tensor
    """[R, V] the base's own, in whatever dtype."""
    streams: Sequence[Scores | None]
    """[S] the companions' own; None for the base and for those that did not run."""
    critical: torch.Tensor | None = None
    """[R] float32 log-odds of the rows' classifier heads, if there are any."""
    measures: Measures | None = None
    """What was measured in the reported rows, if there are any."""
    apart: Mapping[int, torch.Tensor] = MappingProxyType({})
    """Companion → [m, own V] its own scores on rows that may not sum it."""


@dataclass(frozen=True)
class Vocabulary:
    """How a stream's vocabulary lies over the base's.

    Args:
        unshared: [U] int64 ids of the base's table that are not the same token in both; None if
            there are none.
        lacking: whether any of them is a token of the base.
        read_as: [V] int64, the stream's id for each of the base's; None if they are the same.
    """

    unshared: torch.Tensor | None = None
    lacking: bool = False
    read_as: torch.Tensor | None = None
