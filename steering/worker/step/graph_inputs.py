"""What the graphs of streams read of a step, row by row, as one array on the host.

Letters: S streams, N rows of the largest graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np

from steering.worker.plan.batches import Candidates, Int32, StreamBatch

LARGEST = 512
"""Rows of the largest graph, if nobody asks for others; as vLLM's."""


class Field(IntEnum):
    """What a graph reads of each row; −1 for none."""

    REQUEST = 0
    TOKEN = 1
    OWN_ID = 2
    """Read in place of the step's token."""
    POSITION = 3
    """None: a row of padding."""
    LENGTH = 4
    """Of the row's KV after the step; 0 in padding."""
    BLOCK = 5
    """In place of the row's last block: a candidate's."""


def graph_sizes(asked: Sequence[int] | None, most: int) -> tuple[int, ...]:
    """Padded numbers of rows, ascending.

    Args:
        asked: vLLM's `cudagraph_capture_sizes`; None or empty for its default.
        most: requests in a step.
    """
    default = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16)]
    sizes = {n for n in asked or default if n <= most}
    if max(asked or default) >= most:
        sizes.add(most)
    return tuple(sorted(sizes))


def host_inputs(batches: Mapping[int, StreamBatch], scratch: int, streams: int, most: int) -> Int32:
    """[S, 6, N] what some streams' graphs read; for the others nothing but padding.

    Args:
        batches: by stream; of one token per row.
        scratch: the first block for candidates.
        streams: S.
        most: N.
    """
    found = np.full((streams, len(Field), most), -1, np.int32)
    found[:, Field.LENGTH] = 0
    for i, batch in batches.items():
        rows = batch.rows.size
        found[i, Field.REQUEST, :rows] = batch.rows
        found[i, Field.TOKEN, :rows] = batch.tokens
        found[i, Field.OWN_ID, batch.own_at] = batch.own_ids
        found[i, Field.POSITION, :rows] = batch.positions
        found[i, Field.LENGTH, :rows] = batch.lengths
        if isinstance(batch, Candidates):
            found[i, Field.BLOCK, :rows] = scratch + np.arange(rows)
    return found
