"""The nucleus without a sort: where it ends, found in a few launches of one kernel.

Letters and tables: `steering.kernels.triton_kernels`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels.triton_parts import (
    LINES,
    NEVER,
    NUCLEUS,
    PLAUSIBLE,
    TOP,
    count_of,
    key_of,
    line_of,
    marks_of,
    picked,
    rule_of,
    scores_of,
    spread,
    total_mass,
)

WAYS = tl.constexpr(16)
"""Keys that one turn of `narrow` tries."""


@triton.jit
def narrowed(bounds, counts, blocks, p, BLOCKS: tl.constexpr):
    """The bracket that follows from one turn: (lowest key, highest, probability above, way).

    `bounds` is the bracket of that turn and `counts` what its blocks found; of its 16 ways the
    last is taken whose keys and all above have a probability of p. Of a row that counts ids, their
    number stands for the probability.
    """
    low, high = tl.load(bounds).to(tl.int64), tl.load(bounds + 1).to(tl.int64)
    above = tl.load(bounds + 2).to(tl.float32, bitcast=True)
    way, n = tl.arange(0, WAYS), tl.arange(0, BLOCKS)
    at = counts + way[:, None] * blocks + n[None, :]
    mass = above + tl.sum(tl.load(at, mask=n[None, :] < blocks, other=0.0), 1)
    taken = tl.max(tl.where(mass >= p, way, 0), 0)
    step = (high - low) // WAYS + 1
    low += taken * step
    above = tl.where(taken == WAYS - 1, above, tl.sum(tl.where(way == taken + 1, mass, 0.0), 0))
    return low, tl.minimum(low + step - 1, high), above, taken


@triton.jit
def narrow(
    source,
    rules,
    found,
    bounds,
    counts,
    turn,
    size,
    STREAMS: tl.constexpr,
    MARKED: tl.constexpr,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What the keys of one turn have above them in one block of a row that is searched.

    Keys are scores as integers. The lowest key of the nucleus is the highest one from which on
    upwards the probability is at least p; of a plausible row, the one from which on upwards there
    are as many ids as it counts. Arguments as of `triton_kernels.first`.
    """
    logits, steps, widths, rooms, _marks = source
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kind, k, p = rule_of(rules, r, True)
    many = count_of(rules, r, size)
    counting = (kind == PLAUSIBLE) & (many > 1)
    if ~(counting | ((kind == NUCLEUS) & (p < 1))):
        return
    p = tl.where(counting, many, p)
    rows = tl.num_programs(0)
    lines = found + tl.cast(r, tl.int64) * (STREAMS + LINES) * blocks
    mass = total_mass(lines, k, blocks, BLOCKS)
    lines += (STREAMS + TOP) * blocks
    here = tl.cast(turn % 2 * rows + r, tl.int64) * 2 * WAYS * blocks
    last = tl.cast((turn + 1) % 2 * rows + r, tl.int64) * 2 * WAYS * blocks
    bounds += (turn * rows + r) * 4
    if FIRST:
        high = key_of(tl.max(line_of(lines, 0, blocks, BLOCKS), 0), SHIFT).to(tl.int64)
        # All scores below this one together have not the 1 − p that lies outside.
        least = tl.where(counting, NEVER, mass + tl.log((1 - p) / size) - 0.01)
        low = key_of(least, SHIFT).to(tl.int64)
        low, above = tl.minimum(low, high), tl.full((), 0, tl.float32)
    else:
        low, high, above, _way = narrowed(bounds - rows * 4, counts + last, blocks, p, BLOCKS)
    if b == 0:
        tl.store(bounds, low.to(tl.int32))
        tl.store(bounds + 1, high.to(tl.int32))
        tl.store(bounds + 2, above.to(tl.int32, bitcast=True))
    v = b * BLOCK + tl.arange(0, BLOCK)
    # Most blocks have nothing in the bracket after a turn or two.
    wanted = key_of(tl.load(lines + b), SHIFT) >= low
    s = scores_of(
        picked(logits, k), picked(steps, k), picked(widths, k), picked(rooms, k), r, v, wanted
    )
    s = tl.where(((marks_of(source, v, MARKED) >> k) & 1) > 0, NEVER, s)
    key = key_of(s, SHIFT)
    inside = spread(wanted, v) & (key <= high)
    way = tl.arange(0, WAYS)
    keys = (low + way * ((high - low) // WAYS + 1)).to(tl.int32)
    reached = inside[:, None] & (key[:, None] >= keys[None, :])
    p_of = tl.where(spread(counting, v), 1.0, tl.exp(s - mass))
    at = counts + here + way * blocks + b
    tl.store(at, tl.sum(tl.where(reached, p_of[:, None], 0.0), 0))
    if LAST:
        tl.store(at + WAYS * blocks, tl.sum(reached.to(tl.float32), 0))


@triton.jit
def end_of_nucleus(counts, bounds, turns, r, b, blocks, p, BLOCKS: tl.constexpr):
    """(key of its lowest score, the probability above that, ids with it in blocks before b)."""
    rows = tl.num_programs(0)
    turn = turns - 1
    counts += tl.cast(turn % 2 * rows + r, tl.int64) * 2 * WAYS * blocks
    bounds += (turn * rows + r) * 4
    cut, _high, above, way = narrowed(bounds, counts, blocks, p, BLOCKS)
    n = tl.arange(0, BLOCKS)
    # Each way counts what is above it too.
    many = tl.maximum(line_of(counts, WAYS + way, blocks, BLOCKS), 0.0)
    next_way = tl.minimum(WAYS + way + 1, 2 * WAYS - 1)
    more = tl.maximum(line_of(counts, next_way, blocks, BLOCKS), 0.0)
    many -= tl.where(way == WAYS - 1, 0.0, more)
    return cut, above, tl.sum(tl.where(n < b, many, 0.0), 0)


@triton.jit
def inside_nucleus(s, mass, cut, above, ties, p, SHIFT: tl.constexpr):
    """Which scores of a block are inside; of equal ones those with the lowest ids."""
    key = key_of(s, SHIFT)
    tie = (key == cut).to(tl.int32)
    before = (ties + (tl.cumsum(tie, 0) - tie).to(tl.float32)) * tl.exp(s - mass)
    return (key > cut) | ((key == cut) & (above + before < p))
