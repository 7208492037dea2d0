"""How the streams' vocabularies lie over the base's, as tensors for the read-out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from steering.vocabulary import Overlap
from steering.worker.readout.parts import Vocabulary


def vocabularies(
    names: Sequence[str], original: Mapping[str, str], overlaps: Mapping[str, Any]
) -> list[Vocabulary]:
    """[S] how each stream's vocabulary lies over the base's, base first.

    Args:
        names: of the streams.
        original: stream → the stream whose weights it has, often itself.
        overlaps: `Overlap.to_wire()` by stream; one that is left out shares the base's
            vocabulary id by id.
    """
    streams = [Vocabulary()]
    for name in names[1:]:
        wire = overlaps.get(original[name]) or overlaps.get(name)
        streams.append(Vocabulary() if wire is None else _vocabulary(Overlap.from_wire(wire)))
    return streams


def padded(overlaps: Mapping[str, Any]) -> torch.Tensor | None:
    """[P] int64 rows of the base's table that are no token; None if there are none known."""
    anyone = next(iter(overlaps.values()), None)
    rows = Overlap.from_wire(anyone).padded if anyone else ()
    return _tensor(rows) if len(rows) else None


def _vocabulary(overlap: Overlap) -> Vocabulary:
    unshared = np.flatnonzero(~overlap.shared)
    return Vocabulary(
        _tensor(unshared) if unshared.size else None,
        bool(overlap.differing),
        None if overlap.read_as is None else _tensor(overlap.read_as),
    )


def _tensor(ids: Any) -> torch.Tensor:
    return torch.as_tensor(ids, dtype=torch.int64)


def read_as(token_ids: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """The stream's ids for the base's. Compiled code checks no dtypes: it must stay the same."""
    return token_ids if table is None else table[token_ids].to(token_ids.dtype)
