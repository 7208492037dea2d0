"""The inputs of the streams' graphs in a step, row by row, as one array on the host.

Letters: S streams, N tokens of the largest graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from steering.worker.plan.batches import Candidates, Int32, StreamBatch

LARGEST = 512
"""Tokens of the largest graph, if nobody asks for others; as vLLM's."""
DEFAULT = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16))
"""Likewise, of all."""


class Shape(NamedTuple):
    """The shape of a graph.

    Args:
        rows: padded number of rows.
        width: the most tokens of each: 1, or 1 + K where K drafts are verified. `PIECES`: as many
            as they have, `rows` tokens in all, padded.
    """

    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * (self.width or 1)


PIECES = 0
"""The width of a graph in pieces, between which attention is launched for the step's own rows."""


class Field(IntEnum):
    """What a graph reads; −1 for none. Of n rows and T tokens, the first n or T entries."""

    REQUEST = 0
    """Per row: which request it is."""
    TOKEN = 1
    """Per token: where it lies in the step."""
    OWN_ID = 2
    """Per token: the id read in place of the step's."""
    POSITION = 3
    """Per token: its position. None: padding."""
    LENGTH = 4
    """Per row: the length of its KV after the step; 0 in padding."""
    BLOCK = 5
    """Per row: a candidate's block, in place of its last one."""
    PLACE = 6
    """Per token of the batch: where it lies in the graph; rows end together, so that shorter
    ones begin with padding."""
    ROW = 7
    """Per token of a graph in pieces: its row."""
    END = 8
    """Per row of a graph in pieces: where its tokens end."""


def graph_shapes(
    asked: Sequence[int] | None, rows: int, tokens: int, drafts: int
) -> tuple[Shape, ...]:
    """The graphs of a stream, ascending by tokens.

    Args:
        asked: vLLM's `cudagraph_capture_sizes`, in tokens; None or empty for its default.
        rows: the most requests of a step.
        tokens: the most tokens of a step.
        drafts: K, verified in a step; 0 without speculation.
    """
    sizes = asked or DEFAULT
    found = set()
    for width in {1, 1 + drafts}:
        found |= {Shape(-(-size // width), width) for size in sizes}
        if max(sizes) >= rows * width:
            found.add(Shape(rows, width))
    fit = [s for s in found if s.rows <= rows and s.tokens <= tokens]
    return tuple(sorted(fit, key=lambda s: (s.tokens, s.width)))


def piece_shapes(asked: Sequence[int] | None, tokens: int) -> tuple[Shape, ...]:
    """The graphs in pieces of a stream, ascending; each as many graphs as the stream has layers.

    Of the same sizes as the others, but that each is 1/8 or more below the next.

    Args:
        asked: as for `graph_shapes`.
        tokens: likewise.
    """
    found: list[int] = []
    for size in sorted(asked or DEFAULT, reverse=True):
        if size <= tokens and (not found or 8 * size <= 7 * found[-1]):
            found.append(size)
    return tuple(Shape(size, PIECES) for size in reversed(found))


def host_inputs(
    batches: Mapping[int, tuple[StreamBatch, Shape]], scratch: int, streams: int, most: int
) -> Int32:
    """[S, 9, N] what some streams' graphs read; for the others nothing but padding.

    Args:
        batches: stream → (what it runs, its graph's shape).
        scratch: the first block for candidates.
        streams: S.
        most: N.
    """
    found = np.full((streams, len(Field), most), -1, np.int32)
    found[:, Field.LENGTH] = 0
    for i, (batch, shape) in batches.items():
        rows, tokens = batch.rows.size, batch.tokens.size
        place = np.arange(tokens)
        if shape.width == PIECES:
            found[i, Field.ROW, :tokens] = batch.token_rows
            found[i, Field.END, :rows] = batch.starts[1:]
        else:
            ends = (batch.token_rows + 1) * shape.width
            place += ends - batch.starts[1:][batch.token_rows]
        found[i, Field.REQUEST, :rows] = batch.rows
        found[i, Field.TOKEN, place] = batch.tokens
        found[i, Field.OWN_ID, place[batch.own_at]] = batch.own_ids
        found[i, Field.POSITION, place] = batch.positions
        found[i, Field.LENGTH, :rows] = batch.lengths
        found[i, Field.PLACE, :tokens] = place
        if isinstance(batch, Candidates):
            found[i, Field.BLOCK, :rows] = scratch + np.arange(rows)
    return found
