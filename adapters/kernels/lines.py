"""Which tokens use which adapters, as tables of fixed width: what the Triton kernels read.

Where `adapters.kernels.gated` has one object per set and one gate per token, this has one line per
request; a token names its line. So what is prepared and copied in a step grows with its requests,
not with their tokens, and what lies in a line never changes while its request runs. Needs no torch.

Letters: T tokens, L lines, R columns, C and D of them constants and diagonals, and G gate rows of a
set (`adapters.sets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

CONSTANT = -1
"""Instead of a gate row: the column's gate is its weight alone."""


@dataclass(frozen=True, eq=False)
class Line:
    """One request's use of the set in its slot.

    Args:
        weight: [R] float32, what each column is multiplied by, besides a learned gate.
        member: [R] int32, the gate row of each column, 0 to G − 1; `CONSTANT` for none.
        artefact: [G] int32, alike in the gate rows of one routed artefact, unlike otherwise.
        top_k: [G] int32, members that a token is routed to; 0 where the request does not use the
            artefact. Alike in the gate rows of one artefact, as is `temperature`.
        temperature: [G] float32, T > 0.
        constants: C, columns whose activation is 1; after the products.
        diagonals: D, the last columns, which multiply the layer's output.
    """

    weight: Float32
    member: Int32
    artefact: Int32
    top_k: Int32
    temperature: Float32
    constants: int = 0
    diagonals: int = 0

    @property
    def columns(self) -> int:
        """R."""
        return self.weight.size

    @property
    def gates(self) -> int:
        """G."""
        return self.artefact.size

    @property
    def sums(self) -> int:
        """R − D, the first diagonal."""
        return self.columns - self.diagonals

    @property
    def products(self) -> int:
        """R − D − C, the first constant."""
        return self.sums - self.constants


@dataclass(frozen=True, eq=False)
class Lines:
    """The lines of a step, and which tokens use them.

    Args:
        lines: [L]; lines of one slot have the same R, C, D and G.
        slots: [L] int32, the slot of each line's set.
        tokens: [T] int32, each token's line; −1 for tokens without an adapter.
    """

    lines: tuple[Line, ...]
    slots: Int32
    tokens: Int32

    @classmethod
    def none(cls) -> Self:
        """The lines of a step without adapters."""
        empty = np.zeros(0, np.int32)
        return cls((), empty, empty)


class Tiles(NamedTuple):
    """The tokens of a step by slot, and cut into tiles that each lie in one slot.

    Args:
        tokens: [P] int32, the tokens that have a line, those of a slot side by side. Position p of
            this order is where the kernels keep what they compute for a token.
        lines: [P] int32, their lines.
        slots: [N] int32, the slot of each tile.
        starts: [N] int32, its first position.
        ends: [N] int32, its last position + 1.
        first_lines: [N] int32, a line of it.
    """

    tokens: Int32
    lines: Int32
    slots: Int32
    starts: Int32
    ends: Int32
    first_lines: Int32

    @classmethod
    def of(cls, lines: Lines, size: int) -> Tiles:
        """Tiles of at most `size` tokens; no more than `most_tiles` of them."""
        used = np.flatnonzero(lines.tokens >= 0)
        by_token = lines.slots[lines.tokens[used]]
        order = np.argsort(by_token, kind="stable")
        tokens, slots = used[order], by_token[order]
        own = lines.tokens[tokens]
        begins = np.flatnonzero(np.diff(slots, prepend=-1))
        ends = np.flatnonzero(np.diff(slots, append=-1)) + 1
        counts = -(-(ends - begins) // size)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + within * size
        last = np.minimum(starts + size, np.repeat(ends, counts))
        found = (tokens, own, slots[starts], starts, last, own[starts])
        return cls(*(part.astype(np.int32) for part in found))


def most_tiles(tokens: int, slots: int, size: int) -> int:
    """The largest number of tiles that T tokens can have in so many slots."""
    return min(tokens, tokens // size + slots)
