"""Stream batches: which of this step's tokens a stream runs, where, and into which KV slots.

Token index t counts along the vLLM request, whose prompt is the longest of all its streams'.
A stream whose prompt is shorter by d tokens (its *offset*) skips the first d, and keeps its KV
left-aligned in the request's own block table: token t sits at its position p = t − d. So every
stream ends its prompt at the same step, and in decode each runs one token.

Letters: Q requests of this step, T tokens of this step, B blocks per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

NONE: Int64 = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One engine step as vLLM scheduled it, on the host.

    Args:
        request_ids: [Q] in the step's order.
        starts: [Q + 1] where each request's tokens start in the step's token array.
        computed: [Q] tokens computed before this step.
        draws: [Q] whether the step draws a token for the request: not inside a chunked prompt.
        drafts: [Q] how many drafts the step verifies: the last tokens of the request.
        exact: False where `computed` may be too large, since the host does not know yet how many
            drafts were accepted.
    """

    request_ids: Sequence[str]
    starts: Int32
    computed: Int32
    draws: Bool
    drafts: Int32
    exact: bool = True

    @property
    def lengths(self) -> Int32:
        """[Q] tokens that each request runs in this step."""
        return self.starts[1:] - self.starts[:-1]

    @property
    def tokens(self) -> int:
        """T, tokens of the step."""
        return int(self.starts[-1])


@dataclass(frozen=True, slots=True)
class OwnPrompts:
    """What m of the step's requests have one stream read in place of their prompts.

    Args:
        rows: [m] of the step, ascending.
        sizes: [m] tokens.
        ids: [m] their ids.
    """

    rows: Int64
    sizes: Int64
    ids: tuple[Int32, ...]

    @classmethod
    def of(cls, prompts: Sequence[Int32 | None]) -> Self | None:
        """Those of [Q] requests; None if there are none."""
        ids = {row: p for row, p in enumerate(prompts) if p is not None}
        if not ids:
            return None
        return cls(np.array([*ids]), np.array([p.size for p in ids.values()]), tuple(ids.values()))


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """One stream's batch in one step, n rows and T_i tokens.

    Args:
        rows: [n] indices of the requests.
        tokens: [T_i] indices into the step's token array.
        positions: [T_i] the stream's own positions.
        token_rows: [T_i] index into `rows` of each token.
        starts: [n + 1] where each row's tokens start.
        lengths: [n] KV length of each row after this step.
        own_at: [k] indices into the batch's tokens that are of the stream's own prompts.
        own_ids: [k] their ids.
    """

    rows: Int64
    tokens: Int64
    positions: Int64
    token_rows: Int64
    starts: Int32
    lengths: Int32
    own_at: Int64 = field(default_factory=lambda: NONE)
    own_ids: Int64 = field(default_factory=lambda: NONE)

    @property
    def width(self) -> int:
        """Tokens of the row that has most."""
        return int(np.diff(self.starts).max())

    @classmethod
    def of(cls, rows: Int64, ends: Int32) -> Self:
        """A batch of n one-token rows behind prefixes.

        Args:
            rows: [n] the request that each extends.
            ends: [n] length of its prefix.
        """
        each = np.arange(rows.size)
        return cls(
            rows=rows,
            tokens=each,
            positions=ends.astype(np.int64),
            token_rows=each,
            starts=np.arange(rows.size + 1, dtype=np.int32),
            lengths=(ends + 1).astype(np.int32),
        )


class Candidates(StreamBatch):
    """One-token rows behind the prefixes of requests, each with a scratch block as its last.

    Several rows may extend the same request.
    """

    __slots__ = ()

    def begun(self, block_size: int) -> list[tuple[slice, int, int]]:
        """(rows, request, block of the request) of the rows whose last block has begun already.

        Rows that stand together and extend the same request are one entry.
        """
        borders = np.flatnonzero(np.diff(self.rows, prepend=-1, append=-1))
        runs = [slice(int(a), int(b)) for a, b in pairwise(borders)]
        ends = [int(self.positions[run.start]) for run in runs]
        return [
            (run, int(self.rows[run.start]), end // block_size)
            for run, end in zip(runs, ends, strict=True)
            if end % block_size
        ]


def stream_batch(
    schedule: Schedule, uses: Bool, offsets: Int32, prompts: OwnPrompts | None
) -> StreamBatch | None:
    """The batch of one stream, or None when it has nothing to run.

    Args:
        schedule: what vLLM scheduled.
        uses: [Q] whether the request uses the stream.
        offsets: [Q] d ≥ 0: by how many tokens the stream's prompt is shorter.
        prompts: the stream's own prompts; None if it reads every request's.
    """
    ends = schedule.computed + schedule.lengths
    first = np.maximum(schedule.computed, offsets)
    counts = np.where(uses, ends - first, 0)
    rows = np.flatnonzero(counts > 0)
    if not rows.size:
        return None
    counts = counts[rows]
    starts = np.zeros(rows.size + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    token_rows = np.repeat(np.arange(rows.size), counts)
    within = np.arange(starts[-1]) - starts[token_rows]
    position0 = (first - offsets)[rows]
    token0 = (schedule.starts[:-1] + first - schedule.computed)[rows]
    own_at, own_ids = _own_tokens(rows, starts, position0, prompts) if prompts else (NONE, NONE)
    return StreamBatch(
        rows=rows,
        tokens=token0[token_rows] + within,
        positions=(position0[token_rows] + within).astype(np.int64),
        token_rows=token_rows,
        starts=starts,
        lengths=(ends - offsets)[rows].astype(np.int32),
        own_at=own_at,
        own_ids=own_ids,
    )


def whole_batch(schedule: Schedule, tokens: int, width: int) -> StreamBatch | None:
    """The step as scheduled, as a batch; None where a request runs more than `width` tokens.

    Args:
        schedule: what vLLM scheduled.
        tokens: of the step, padding included.
        width: the most tokens of a row.
    """
    count = schedule.computed.size
    if schedule.tokens != tokens or schedule.lengths.max() > width:
        return None
    return stream_batch(schedule, np.ones(count, np.bool_), np.zeros(count, np.int32), None)


def _own_tokens(
    rows: Int64, starts: Int32, position0: Int32, prompts: OwnPrompts
) -> tuple[Int64, Int64]:
    _, k, which = np.intersect1d(rows, prompts.rows, assume_unique=True, return_indices=True)
    unread = position0[k] < prompts.sizes[which]
    at, ids = [NONE], [NONE]
    for j, i in zip(k[unread].tolist(), which[unread].tolist(), strict=True):
        begin, count = position0[j], starts[j + 1] - starts[j]
        own = prompts.ids[i][begin : begin + count]
        at.append(np.arange(starts[j], starts[j] + own.size))
        ids.append(own.astype(np.int64))
    return np.concatenate(at), np.concatenate(ids)
