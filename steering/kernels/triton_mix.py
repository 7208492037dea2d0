"""The read-out on a GPU: which kernels are launched, with which tables.

`mix` is `steering.kernels.mix.mix` by other means; `read_out` also takes what the worker would
otherwise do around it in further passes. Nothing here waits for the device.

Held to the definition through Triton's interpreter on the CPU, and compiled for NVIDIA GPUs in the
tests; block sizes are chosen by reasoning, not by measurement (`load_tests/readout_bench`).

Letters: R rows, V the base's vocabulary, S streams (base first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from steering.kernels.mix import BLOCK, FEW_ROWS, Measures, Rules
from steering.kernels.triton_finish import finish
from steering.kernels.triton_kernels import compare, first
from steering.kernels.triton_nucleus import WAYS, narrow
from steering.kernels.triton_parts import LINES

ROUND = 16
"""Numbers in a row are read by that many at a time where the row has room for it."""

VARIANTS = 38
"""How many variants of the kernels one model with one dtype of scores has at most."""

KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}
"""Leading bits of a score as float32 that tell it from any other score of the dtype."""


class Additions(NamedTuple):
    """What is added to some scores, [R, K] float32 each: ids below 2²⁴, and the numbers.

    Where both are 0 there is none. Rows that have one are steered.
    """

    ids: torch.Tensor
    added: torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """How the vocabulary is cut.

    Args:
        size: ids of a program. A few rows give few programs, too few for the whole GPU.
        warps: of a program. Eight ids to a thread: it reads a stream 16 bytes at a time, and has
            registers left for enough threads to hide that.
    """

    size: int
    warps: int

    @classmethod
    def of(cls, rows: int) -> Blocks:
        """For R rows."""
        return cls(1024, 4) if rows <= FEW_ROWS else cls(BLOCK, 8)


def marks(size: int, unshared: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """Which ids a stream does not have: one number per id.

    Bit i: stream i does not have the token; for the base: the id is no token, and never drawn from
    a steered row. Padded to whole blocks.

    Args:
        size: V.
        unshared: per stream, base first, int64 ids below V, or None.
        device: of the answer.
    """
    dtype = torch.uint8 if len(unshared) <= 8 else torch.int32
    assert len(unshared) <= 31
    table = torch.zeros(padded(size), dtype=dtype, device=device)
    for i, ids in enumerate(unshared):
        if ids is not None:
            table[ids] |= 1 << i
    return table


def padded(size: int) -> int:
    """The ids of whole blocks, of any size."""
    return -(-size // BLOCK) * BLOCK


def mix(
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    rules: Rules | None = None,
    lacking: bool = True,
) -> torch.Tensor:
    """`z` for R rows, [R, V] float32; arguments as of `steering.kernels.mix.mix`.

    `logits` may also be bfloat16 or float16.
    """
    z, _ = read_out(logits, coef, rules, lacking)
    return z


def read_out(
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    rules: Rules | None,
    lacking: bool = True,
    marked: torch.Tensor | None = None,
    additions: Additions | None = None,
    reported: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Measures | None]:
    """Scores of R rows, and what their reports say.

    A row whose coefficients are those of the base alone, without rule and additions, gets the
    base's scores bit for bit, also on ids that are no token.

    Args:
        logits: per stream [R, V_i] raw scores, all float32, bfloat16 or float16; the base's has V
            columns, a stream's other columns than the first V are left aside and those it has not
            count as −∞. None for a stream that no row uses.
        coef: [R, S] float32 coefficients; where 0 the stream's row is not read.
        rules: None when every row is a plain sum. No `SELECT` has a count: the torch path sorts.
            Sets of ends that are padded to whole blocks need no copy.
        lacking: False promises that no stream lacks an id that the base has, which saves work.
        marked: what `marks` made of the vocabularies; None if all streams have all ids.
        additions: what is added to the scores, before the report; None for nothing.
        reported: [R] float32, contiguous, not 0 where a row reports; None if none does.

    Returns:
        [R, V] float32 (its rows may lie further apart than V), and [R] measures if any row
        reports: 0 on the others.

    How many variants of the kernels are compiled for one model depends on flags alone, not on
    which streams run: of `first` one for each choice of (a rule occurs, a stream lacks ids,
    a row reports, more than 16 rows), of `finish` those with a rule or a stream that lacks ids, of
    `narrow` one per (first turn, second, a later one, the last; more than 16 rows), of `compare`
    one per size of block. That is at most 16 + 12 + 8 + 2 = `VARIANTS` for each dtype of scores.
    """
    base = logits[0]
    assert base is not None, "the base runs in every step"
    (rows, size), device = base.shape, base.device
    assert all(s is None or (s.dtype == base.dtype and _adjacent(s)) for s in logits)
    room = -(-size // ROUND) * ROUND
    z = torch.empty(rows, room, device=device)
    cut = Blocks.of(rows)
    blocks = triton.cdiv(size, cut.size)
    streams = len(logits)
    sources = [base if s is None else s for s in logits]
    found = torch.empty(rows, streams + LINES.value, blocks, device=device)
    measured = torch.empty(rows if reported is not None else 0, 7, blocks, device=device)
    source = (
        tuple(sources),
        tuple(s.stride(0) for s in sources),
        tuple(min(s.shape[1], size) for s in sources),
        tuple(_room(s, size) for s in sources),
        coef if marked is None else marked,
    )
    table = _rules(rules, coef, size)
    more = additions or Additions(coef, coef)
    assert _adjacent(coef) and _adjacent(more.ids) and _adjacent(more.added)
    assert more.ids.stride(0) == more.added.stride(0)
    row = (
        (coef, coef.stride(0)),
        table,
        (more.ids, more.added, more.ids.stride(0)),
        coef if reported is None else reported,
        (z, z.stride(0), room, measured),
        found,
    )
    candidates = 0 if additions is None else additions.ids.shape[1]
    static = {
        "STREAMS": streams,
        "MARKED": marked is not None,
        "BLOCK": cut.size,
        "num_warps": cut.warps,
    }
    own = {
        "RULES": rules is not None,
        "LACKING": lacking,
        "CANDIDATES": candidates,
        "PLACES": triton.next_power_of_2(max(candidates, 1)),
        "REPORTS": reported is not None,
    }
    grid = (rows, blocks)
    if not rows:
        return z[:, :size], None
    first[grid](source, *row, size, **static, **own)
    if rules is not None or lacking:
        bits = KEY_BITS[base.dtype]
        turns = -(-bits // 4)
        launched = turns if rules is not None and rules.searched else 0
        bounds = torch.empty(launched, rows, 4, dtype=torch.int32, device=device)
        counts = torch.empty(min(launched, 2), rows, 2 * WAYS.value, blocks, device=device)
        static |= {"SHIFT": 32 - bits, "BLOCKS": triton.next_power_of_2(blocks)}
        for turn in range(launched):
            ends = {"FIRST": turn == 0, "LAST": turn == turns - 1}
            narrow[grid](source, table, found, bounds, counts, turn, size, **static, **ends)
        finish[grid](source, *row, bounds, counts, turns, size, **static, **own)
    if reported is None:
        return z[:, :size], None
    numbers = torch.zeros(3, rows, device=device)
    choices = torch.zeros(2, rows, dtype=torch.int64, device=device)
    sizes = {"BLOCKS": triton.next_power_of_2(blocks)}
    compare[(rows,)](reported, measured, numbers, choices, blocks, **sizes)
    return z[:, :size], Measures(*numbers, *choices)


def _rules(rules: Rules | None, coef: torch.Tensor, size: int) -> tuple[object, ...]:
    """What the kernels take of the rules; anything for what no row has."""
    if rules is None:
        columns = (coef,) * 7
        return columns, tuple(c.stride(0) for c in columns), coef, 0
    # A column as far apart as those that it stands for: it is no variant of its own.
    none = rules.kind.new_zeros(rules.kind.shape[0], rules.kind.stride(0))[:, 0]
    odds = none if rules.odds is None else rules.odds
    if rules.ends is None:
        columns = (*rules[:5], odds, none)
        table = torch.zeros(1, padded(size), dtype=torch.uint8, device=coef.device)
    else:
        columns = (*rules[:5], odds, rules.ends.which)
        table = rules.ends.table.view(torch.uint8)
        if table.shape[1] % BLOCK:
            table = torch.nn.functional.pad(table, (0, padded(size) - table.shape[1]))
    return columns, tuple(c.stride(0) for c in columns), table, table.stride(0)


def _adjacent(table: torch.Tensor) -> bool:
    """Whether the numbers of a row are neighbours in memory."""
    return table.stride(1) == 1 or table.shape[1] <= 1


def _room(s: torch.Tensor, size: int) -> int:
    """How many numbers of each row may be read, of which the first ones are its scores."""
    width = min(s.shape[1], size)
    room = -(-width // ROUND) * ROUND
    last = s.storage_offset() + (s.shape[0] - 1) * s.stride(0) + room
    fits = s.stride(0) % ROUND == 0 and last * s.itemsize <= s.untyped_storage().nbytes()
    return room if fits else width
