"""Which tap a row is contrasted with, on a GPU: three Triton kernels.

    masses   every row and block of the vocabulary: log Σ exp of the base and of the row's taps
    differ   every row and block: its part of how far each tap differs from the base
    choose   every row: the tap that differs most, the coefficients with it alone, and the shift

`contrast` is `steering.kernels.layers.contrast` by other means, over all rows of a step; rows
without such a rule are left as they are. Programs meet only between launches, and nothing waits
for the device. Held to the definition through Triton's interpreter on the CPU.

Letters: R rows, V the base's vocabulary, S streams (base first), B blocks of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from steering.kernels.layers import Contrast
from steering.kernels.triton_parts import NEVER, log_add, log_mass, total_mass
from steering.plan import LayerKind

CONTRAST = tl.constexpr(float(LayerKind.CONTRAST))
CONTRAST_JSD = tl.constexpr(float(LayerKind.CONTRAST_JSD))
LOG_2 = tl.constexpr(math.log(2))

BLOCK = 1024
"""Ids of a program; four warps."""


def contrast(
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    kind: torch.Tensor,
    marked: torch.Tensor | None = None,
) -> Contrast:
    """The coefficients of R rows, and the shifts of their scores.

    Args:
        logits: per stream [R, V_i] raw scores, float32, bfloat16 or float16, the numbers of a row
            side by side. None for a stream that no row uses. A tap has the base's vocabulary.
        coef: [R, S] float32.
        kind: [R] `LayerKind` as float32, any distance apart.
        marked: [≥ V] integers, of which bit 0 says that an id of the base is no token; None if
            all are.
    """
    base = logits[0]
    assert base is not None, "the base runs in every step"
    (rows, size), streams = base.shape, len(logits)
    sources = [base if s is None else s for s in logits]
    blocks = triton.cdiv(size, BLOCK)
    found = torch.empty(rows, streams, blocks, device=base.device)
    parts = torch.empty(rows, streams, blocks, device=base.device)
    out, shift = coef.clone(), torch.zeros(rows, device=base.device)
    if not rows:
        return Contrast(out, shift)
    source = (
        tuple(sources),
        tuple(s.stride(0) for s in sources),
        tuple(min(s.shape[1], size) for s in sources),
        coef if marked is None else marked,
    )
    row = (coef, coef.stride(0), kind, kind.stride(0))
    fixed = {"STREAMS": streams, "MARKED": marked is not None, "BLOCK": BLOCK}
    many = triton.next_power_of_2(blocks)
    masses[(rows, blocks)](source, row, found, size, **fixed)
    differ[(rows, blocks)](source, row, found, parts, size, **fixed, BLOCKS=many)
    places = triton.next_power_of_2(streams)
    choose[(rows,)](row, found, parts, (out, out.stride(0), shift), blocks, streams, many, places)
    return Contrast(out, shift)


@triton.jit
def is_contrast(row, r):
    """Whether row r has such a rule, and whether by the Jensen-Shannon divergence."""
    _coef, _apart, kind, apart = row
    own = tl.load(kind + r * apart)
    return (own == CONTRAST) | (own == CONTRAST_JSD), own == CONTRAST_JSD


@triton.jit
def scores(source, i: tl.constexpr, r, v):
    """Raw scores of stream i, float32; −inf behind its width."""
    logits, steps, widths, _marked = source
    at = logits[i] + tl.cast(r, tl.int64) * steps[i] + v
    return tl.load(at, mask=v < widths[i], other=NEVER).to(tl.float32)


@triton.jit
def base_scores(source, r, v, size, MARKED: tl.constexpr):
    """Those of the base; −inf where an id is no token."""
    s = scores(source, 0, r, v)
    token = v < size
    if MARKED:
        token = token & ((tl.load(source[3] + v, mask=v < size, other=1).to(tl.int32) & 1) == 0)
    return tl.where(token, s, NEVER)


@triton.jit
def masses(
    source,
    row,
    found,
    size,
    STREAMS: tl.constexpr,
    MARKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Found [R, S, B]: log Σ exp of each block, over ids that the base has."""
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    contrasted, _jsd = is_contrast(row, r)
    if ~contrasted:
        return
    v = b * BLOCK + tl.arange(0, BLOCK)
    base = base_scores(source, r, v, size, MARKED)
    lines = found + tl.cast(r, tl.int64) * STREAMS * blocks + b
    tl.store(lines, log_mass(base))
    for i in tl.static_range(1, STREAMS):
        if tl.load(row[0] + r * row[1] + i) < 0:
            s = tl.where(base > NEVER, scores(source, i, r, v), NEVER)
            tl.store(lines + i * blocks, log_mass(s))


@triton.jit
def differ(
    source,
    row,
    found,
    parts,
    size,
    STREAMS: tl.constexpr,
    MARKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Parts [R, S, B]: each block's part of twice the divergence of a tap."""
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    contrasted, jsd = is_contrast(row, r)
    if ~contrasted:
        return
    v = b * BLOCK + tl.arange(0, BLOCK)
    base = base_scores(source, r, v, size, MARKED)
    lines = found + tl.cast(r, tl.int64) * STREAMS * blocks
    p = base - total_mass(lines, 0, blocks, BLOCKS)
    for i in tl.static_range(1, STREAMS):
        if tl.load(row[0] + r * row[1] + i) < 0:
            s = tl.where(base > NEVER, scores(source, i, r, v), NEVER)
            q = s - total_mass(lines, i, blocks, BLOCKS)
            mean = log_add(p, q) - LOG_2
            if jsd:
                part = tl.exp(p) * (p - mean) + tl.exp(q) * (q - mean)
            else:
                part = tl.exp(mean) * (2 * mean - p - q)
            part = tl.sum(tl.where(base > NEVER, part, 0.0), 0)
            tl.store(parts + (tl.cast(r, tl.int64) * STREAMS + i) * blocks + b, part)


@triton.jit
def choose(
    row,
    found,
    parts,
    out,
    blocks,
    STREAMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The first tap among equals; rows of other rules are not written."""
    r = tl.program_id(0)
    contrasted, _jsd = is_contrast(row, r)
    if ~contrasted:
        return
    lines = found + tl.cast(r, tl.int64) * STREAMS * blocks
    most, chosen = tl.full((), NEVER, tl.float32), tl.full((), 0, tl.int32)
    shift = tl.full((), 0, tl.float32)
    n = tl.arange(0, BLOCKS)
    for i in tl.static_range(1, STREAMS):
        c = tl.load(row[0] + r * row[1] + i)
        if c < 0:
            at = parts + (tl.cast(r, tl.int64) * STREAMS + i) * blocks + n
            whole = tl.sum(tl.load(at, mask=n < blocks, other=0.0), 0)
            if whole > most:
                most = whole
                chosen = tl.full((), i, tl.int32)
                shift = -c * total_mass(lines, i, blocks, BLOCKS)
    coefficients, apart, shifts = out
    shift -= tl.load(row[0] + r * row[1]) * total_mass(lines, 0, blocks, BLOCKS)
    tl.store(shifts + r, shift)
    places = tl.arange(0, PLACES)
    own = tl.load(row[0] + r * row[1] + places, mask=places < STREAMS, other=0.0)
    own = tl.where((own >= 0) | (places == chosen), own, 0.0)
    tl.store(coefficients + r * apart + places, own, mask=places < STREAMS)
