"""Shared by the read-out's kernels. Letters and tables: `steering.kernels.triton_kernels`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import triton
import triton.language as tl

from steering.plan import Ender, Gate, RuleKind

NEVER = tl.constexpr(float("-inf"))
INFINITE = tl.constexpr(float("inf"))
PLAUSIBLE = tl.constexpr(float(RuleKind.PLAUSIBLE))
NUCLEUS = tl.constexpr(float(RuleKind.NUCLEUS))
SELECT = tl.constexpr(float(RuleKind.SELECT))
HEAD, DOUBT = tl.constexpr(int(Gate.HEAD)), tl.constexpr(int(Gate.DOUBT))
SUM_ENDS_TEXT = tl.constexpr(int(Ender.SUM))
STREAM_ENDS_TEXT = tl.constexpr(int(Ender.STREAM))

TOP = tl.constexpr(0)
"""Line of `found`: the largest score of k."""
OTHERS, ENDS = tl.constexpr(1), tl.constexpr(2)
"""Log Σ exp of k outside of the ids that k may not draw, some of E or none, and on them."""
BEST, BEST_ID = tl.constexpr(3), tl.constexpr(4)
"""The largest score of k outside of them, and its id."""
SUM, SUM_ENDS = tl.constexpr(5), tl.constexpr(6)
"""Log Σ exp of the sum, outside of them and on them, over ids that no stream of it lacks."""
LACKS, LACKS_ENDS = tl.constexpr(7), tl.constexpr(8)
"""The same of the base over the other ids."""
OPEN = tl.constexpr(9)
"""1 where `first` left the block to `finish`, whatever the rule."""
HIGH, DEEP = tl.constexpr(10), tl.constexpr(11)
"""The largest score of the sum, and of its negative, over ids that no stream of it lacks. Of a
`SELECT` row the largest outside of E, and on E."""
LACKS_HIGH, LACKS_DEEP = tl.constexpr(12), tl.constexpr(13)
"""The same of the base over the other ids."""
LINES = tl.constexpr(14)


@triton.jit
def log_mass(x):
    """Log Σ exp, −inf where all is −inf."""
    top = tl.max(x, 0)
    at = tl.where(top > NEVER, top, 0.0)
    return at + tl.log(tl.sum(tl.exp(x - at), 0))


@triton.jit
def log_add(x, y):
    """Log (eˣ + eʸ)."""
    top = tl.maximum(x, y)
    at = tl.where(top > NEVER, top, 0.0)
    return at + tl.log(tl.exp(x - at) + tl.exp(y - at))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def picked(choices, index):
    """`choices[index]` of a tuple, by an index that is not known when the kernel is compiled."""
    found = choices[0]
    for i in tl.static_range(1, len(choices)):
        found = tl.where(index == i, choices[i], found)
    return found


@triton.jit
def line_of(lines, i, blocks, BLOCKS: tl.constexpr):
    """[BLOCKS] line i of a table, one number per block of the vocabulary; −inf behind the last."""
    n = tl.arange(0, BLOCKS)
    return tl.load(lines + i * blocks + n, mask=n < blocks, other=NEVER)


@triton.jit
def total_mass(lines, i, blocks, BLOCKS: tl.constexpr):
    """Log Σ exp over all blocks."""
    return log_mass(line_of(lines, i, blocks, BLOCKS))


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """Integers in the order of floats, without the lowest `SHIFT` bits; both zeros are alike."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def rule_of(rules, r, RULES: tl.constexpr):
    """(kind, k, parameter) of a row; a plain sum where no row has a rule."""
    kind, k = tl.full((), 0, tl.float32), tl.full((), 0, tl.int32)
    param = tl.full((), 0, tl.float32)
    columns, apart, _ends, _apart = rules
    if RULES:
        kind = tl.load(columns[0] + r * apart[0])
        k = tl.load(columns[1] + r * apart[1]).to(tl.int32)
        param = tl.load(columns[2] + r * apart[2])
    return kind, k, param


@triton.jit
def count_of(rules, r, size):
    """How many ids a plausible row's count stands for, as float32; 1 for none."""
    columns, apart, _ends, _apart = rules
    count = tl.load(columns[3] + r * apart[3])
    share = tl.where((count > 0) & (count < 1), count * size, count)
    return tl.minimum(tl.maximum(tl.floor(share), 1.0), size * 1.0)


@triton.jit
def selects(rules, r):
    """(gate, whether it is hard, who ends the text, whether only the best id counts, log-odds)."""
    columns, apart, _ends, _apart = rules
    bits = tl.load(columns[4] + r * apart[4])
    bits = tl.minimum(tl.maximum(bits, 0.0), 127.0).to(tl.int32)
    odds = tl.load(columns[5] + r * apart[5])
    return bits & 3, (bits & 4) > 0, (bits >> 3) & 3, (bits & 32) > 0, odds


@triton.jit
def ending_of(rules, r, v):
    """Which of the ids v end a text, in a row whose rule asks."""
    columns, apart, ends, step = rules
    which = tl.load(columns[6] + r * apart[6]).to(tl.int64)
    return tl.load(ends + which * step + v).to(tl.int32) > 0


@triton.jit
def weight_of(coef, r, kind, k, i: tl.constexpr):
    """c_i in the sum; the stream of a `SELECT` is not in it."""
    numbers, apart = coef
    c = tl.load(numbers + r * apart + i)
    return tl.where((kind == SELECT) & (k == i), 0.0, c)


@triton.jit
def additions_of(more, r, CANDIDATES: tl.constexpr, PLACES: tl.constexpr):
    """[PLACES] ids that something is added to, and what; 0 and 0 where there is none."""
    ids, added, apart = more
    n = tl.arange(0, PLACES)
    at = r * apart + n
    own = n < CANDIDATES
    places = tl.load(ids + at, mask=own, other=0.0).to(tl.int32)
    return places, tl.load(added + at, mask=own, other=0.0)


@triton.jit
def is_steered(
    coef,
    kind,
    more,
    r,
    STREAMS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Whether the row is anything but the base's own scores."""
    numbers, apart = coef
    found = (tl.load(numbers + r * apart) != 1) | (kind != 0)
    for i in tl.static_range(1, STREAMS):
        found |= tl.load(numbers + r * apart + i) != 0
    if CANDIDATES > 0:
        places, plus = additions_of(more, r, CANDIDATES, PLACES)
        found |= tl.max(((places != 0) | (plus != 0)).to(tl.int32), 0) > 0
    return found


@triton.jit
def spread(flag, v):
    """One flag for all of v. The interpreter takes a scalar that compares floats for a float."""
    return (tl.zeros_like(v) + flag.to(tl.int32)) > 0


@triton.jit
def marks_of(source, v, MARKED: tl.constexpr):
    """The marks of some ids: bit i, stream i has no such token."""
    mark = tl.zeros_like(v)
    if MARKED:
        mark = tl.load(source[4] + v).to(tl.int32)
    return mark


@triton.jit
def scores_of(source, step, width, room, r, v, wanted):
    """Raw scores of one row, float32; −inf beyond the stream's width, anything if not `wanted`."""
    # Whole sixteens are loaded, 16 bytes at a time, and what lies behind the width thrown away.
    s = tl.load(
        source + tl.cast(r, tl.int64) * step + v, mask=(v < room) & spread(wanted, v), other=0.0
    )
    return tl.where(v < width, s.to(tl.float32), NEVER)


@triton.jit
def streams_of(
    source,
    mark,
    coef,
    kind,
    k,
    r,
    v,
    whole,
    alone,
    base,
    steered,
    lines,
    blocks,
    noting,
    NOTE: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """Reads the block of each stream once.

    The streams of the sum are read if `whole`, stream k if `alone`, the base if `base`. With
    `NOTE`, rows that are `noting` write the log Σ exp of what is read into `lines`.

    Returns the sum, a nucleus row's without c_k s_k; c_k s_k of that; where each of the two is
    −inf; which ids a stream of the sum lacks; the base's scores, as they are and without its
    padding; the scores of k.
    """
    logits, steps, widths, rooms, _marks = source
    total, own = tl.zeros(v.shape, tl.float32), tl.zeros(v.shape, tl.float32)
    never = tl.zeros(v.shape, tl.int1)
    own_never, lacking = never, never
    raw, plain, chosen = total, total, total
    padding = spread(steered, v)
    for i in tl.static_range(STREAMS):
        c = weight_of(coef, r, kind, k, i)
        apart = (kind == NUCLEUS) & (k == i)
        summed = (whole | apart) & (c != 0)
        wanted = summed | (alone & (k == i))
        if i == 0:
            wanted = wanted | base
        s = scores_of(logits[i], steps[i], widths[i], rooms[i], r, v, wanted)
        if i == 0:
            raw = s
        s = tl.where((((mark >> i) & 1) > 0) & padding, NEVER, s)
        if i == 0:
            plain = s
        else:
            lacking = lacking | (spread(summed, v) & (s == NEVER))
        chosen = tl.where(k == i, s, chosen)
        # What is no number has no place in a sum either.
        known = tl.abs(s) < INFINITE
        part = tl.where(known, c * s, 0.0)
        alike, other = spread(summed & apart, v), spread(summed & ~apart, v)
        own += tl.where(alike, part, 0.0)
        total += tl.where(other, part, 0.0)
        own_never = own_never | (alike & ~known)
        never = never | (other & ~known)
        if NOTE:  # noqa: SIM102 - decides what is compiled; the other, what runs
            if (wanted & noting) | apart:
                tl.store(lines + i * blocks, log_mass(s))
    return total, own, never, own_never, lacking, raw, plain, chosen


@triton.jit
def put(
    out,
    scores,
    raw,
    more,
    reported,
    r,
    b,
    v,
    blocks,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    REPORTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a finished block, with what is added to it, and what a report needs of it."""
    z, z_row, z_room, measured = out
    if CANDIDATES > 0:
        ids, added, apart = more
        at, plus = additions_of(more, r, CANDIDATES, PLACES)
        here = (at // BLOCK == b) & (plus != 0)
        if tl.max(here.to(tl.int32), 0) > 0:
            for n in range(CANDIDATES):
                place = tl.load(ids + r * apart + n).to(tl.int32)
                one = tl.load(added + r * apart + n)
                scores += tl.where(v == place, one, 0.0)
    tl.store(z + tl.cast(r, tl.int64) * z_row + v, scores, mask=v < z_room)
    if REPORTS:  # noqa: SIM102 - decides what is compiled; the other, what runs
        if tl.load(reported + r) != 0:
            mass = log_mass(scores)
            p = tl.exp(scores - tl.where(mass > NEVER, mass, 0.0))
            best, best_id = tl.max(scores, 0, return_indices=True)
            base, base_id = tl.max(raw, 0, return_indices=True)
            line = measured + tl.cast(r, tl.int64) * 7 * blocks + b
            tl.store(line, mass)
            tl.store(line + blocks, tl.sum(tl.where(p > 0, p * (scores - raw), 0.0), 0))
            tl.store(line + 2 * blocks, log_mass(raw))
            tl.store(line + 3 * blocks, best)
            tl.store(line + 4 * blocks, (b * BLOCK + best_id).to(tl.float32))
            tl.store(line + 5 * blocks, base)
            tl.store(line + 6 * blocks, (b * BLOCK + base_id).to(tl.float32))
