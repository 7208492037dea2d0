"""The adapter sum on a GPU: three Triton kernels, launched once each per linear layer.

    shrink   u = A x of every tile of tokens, in parts along x that another program adds up
    gate     v = g ⊙ u, with MeteoRA's learned gate from the scores that ride below A; u is 1 for
             constants and diagonals
    expand   y += B v + y ⊙ D v, D the columns of B that are diagonals

However many sets the tokens use, there is one launch of each: a program reads from the tables
(`adapters.kernels.triton_sum`) what it works on, or that there is nothing for it. Launch shapes
depend on the layer and the number of tokens alone, so the launches can be recorded in a graph.

Rounding is that of `adapters.kernels.gated`: u, v and what is added to y are rounded to the dtype
of x, all else is float32. Parts are added in a fixed order; there are no floating-point atomics.

Letters: T tokens, P positions (`adapters.kernels.lines.Tiles`), R columns and G gate rows of a set.
A name in capitals is known when a kernel is compiled. `WIDE` widens factors to float32 before they
are multiplied, which changes no product: the interpreter multiplies the bits of bfloat16. `RANKS`
is K, the rank indices of a slot up to the next power of two. Nothing else about a step is known
then: what its sets lack (gates, constants, diagonals) a program finds out when it runs.

The tables, all int32, in the order in which the kernels read them:

    counting [1] whether `counts` grows
    tiles   [N, 4] slot, first position, last position + 1, and a line of each tile; the last two
            positions are alike where there is no tile
    lines   [T] the line at each position, −1 beyond P
    tokens  [P] the token at each position
    table   [L, HEAD + 7 K / 2] per line: R, G, the first constant and the first diagonal, then
            weight [K] float32, member [K], artefact [K / 2], top_k [K / 2], temperature [K / 2]
            float32, as in `adapters.kernels.lines.Line`
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import triton
import triton.language as tl

HEAD = tl.constexpr(4)
"""Integers of a line before its weights; they keep the weights at addresses of 16 bytes."""


@triton.jit
def _pick(choices, index):
    """`choices[index]` of a tuple, by an index that is not known when the kernel is compiled."""
    found = choices[0]
    for i in tl.static_range(1, len(choices)):
        found = tl.where(index == i, choices[i], found)
    return found


@triton.jit
def _dot(left, right, total, WIDE: tl.constexpr):
    """`sum` + left @ right, all products and sums in float32."""
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _tile(tiles, tile):
    """(slot, first position, last position + 1, line) of a tile."""
    at = tiles + tile * 4
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _ranks(table, line, RANKS: tl.constexpr):
    """(R, G) of a line's set."""
    at = table + line * (HEAD + RANKS // 2 * 7)
    return tl.load(at), tl.load(at + 1)


@triton.jit(do_not_specialize=["splits", "split_step", "slice_step"])
def shrink(
    x,
    x_row,
    x_column,
    into,
    a,
    a_slot,
    a_row,
    u,
    splits,
    split_step,
    slice_step,
    tiles,
    tokens,
    table,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    INTO: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One part of u for one tile, one block of rows of A and one packed layer.

    x [T, in] has rows `x_row` and columns `x_column` apart. a has per packed layer [slots,
    ≥ R + G, in], slots `a_slot` and rows `a_row` apart. u [splits, layers, T, K] float32 gets the
    parts by position, up to R + G; a tile's x is shared by `splits` programs, each of which takes
    every `splits`th block of it.
    """
    split = tl.program_id(0) % splits
    slot, start, end, line = _tile(tiles, tl.program_id(0) // splits)
    if start >= end:
        return
    columns, gates = _ranks(table, line, RANKS)
    rows = columns + gates
    first = tl.program_id(1) * ROWS
    if first >= rows:
        return
    layer = tl.program_id(2)
    p, r = start + tl.arange(0, TOKENS), first + tl.arange(0, ROWS)
    token = tl.load(tokens + p, mask=p < end, other=0).to(tl.int64)
    x_lines = x + token[:, None] * x_row
    a_lines = _pick(a, layer) + slot * a_slot + r[None, :] * a_row
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for block in range(split * INTO, into, splits * INTO):
        i = block + tl.arange(0, INTO)
        own = (p[:, None] < end) & (i[None, :] < into)
        part = tl.load(x_lines + i[None, :] * x_column, mask=own, other=0.0)
        own = (r[None, :] < rows) & (i[:, None] < into)
        total = _dot(part, tl.load(a_lines + i[:, None], mask=own, other=0.0), total, WIDE)
    out = u + split.to(tl.int64) * split_step + layer.to(tl.int64) * slice_step
    own = (p[:, None] < end) & (r[None, :] < rows)
    tl.store(out + p[:, None] * RANKS + r[None, :], total, mask=own)


@triton.jit
def _added_up(u, splits, split_step, at, own, dtype: tl.constexpr):
    """The parts at `at` added up and rounded to `dtype`, in float32."""
    total = tl.load(u + at, mask=own, other=0.0)
    for split in range(1, splits):
        total += tl.load(u + tl.cast(split, tl.int64) * split_step + at, mask=own, other=0.0)
    return total.to(dtype).to(tl.float32)


@triton.jit
def _learned(scores, own, artefact, top_k, temperature, g):
    """[GATES] softmax(top-k / T) by artefact, 0 elsewhere; and which members were chosen.

    Of equal scores the lower index wins, as in the definition.
    """
    one = own[:, None] & own[None, :] & (artefact[:, None] == artefact[None, :])
    tie = (scores[None, :] == scores[:, None]) & (g[None, :] < g[:, None])
    ahead = one & ((scores[None, :] > scores[:, None]) | tie)
    chosen = own & (tl.sum(ahead.to(tl.int32), 1) < top_k)
    highest = tl.max(tl.where(one, scores[None, :], float("-inf")), 1)
    exponents = tl.where(chosen, tl.exp((scores - highest) / temperature), 0.0)
    sums = tl.sum(tl.where(one, exponents[None, :], 0.0), 1)
    # Where a member was chosen the sum is at least 1, the highest score's part.
    return exponents / tl.maximum(sums, 1.0), chosen


@triton.jit
def _routes(
    u,
    splits,
    split_step,
    here,
    scores,
    rows,
    gates,
    member,
    own,
    count,
    grows,
    dtype: tl.constexpr,
    RANKS: tl.constexpr,
    GATES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """[RANKS] the learned gate of each column, 1 where there is none; counts what was chosen.

    `rows` points to a line's `artefact`, of which `gates` ≤ `GATES` are used; `here` is where u
    has their scores, or with `SPLIT` `scores` points to them.
    """
    g = tl.arange(0, GATES)
    routed = g < gates
    temperature = tl.load(rows + RANKS + g, mask=routed, other=0)
    if SPLIT:
        found = tl.load(scores + g, mask=routed, other=0.0)
    else:
        found = _added_up(u, splits, split_step, here + g, routed, dtype)
    learned, chosen = _learned(
        found,
        routed,
        tl.load(rows + g, mask=routed, other=0),
        tl.load(rows + RANKS // 2 + g, mask=routed, other=0),
        temperature.to(tl.float32, bitcast=True),
        g,
    )
    if grows != 0:
        tl.atomic_add(count + g, 1, mask=chosen, sem="relaxed")
    return tl.where(own & (member >= 0), tl.gather(learned, tl.maximum(member, 0), 0), 1.0)


@triton.jit(do_not_specialize=["splits", "split_step", "slice_step"])
def score(
    u,
    splits,
    split_step,
    slice_step,
    scores,
    lines,
    table,
    RANKS: tl.constexpr,
):
    """The gates' scores of one position and one packed layer, for a sum over ranks.

    u is what `shrink` wrote. scores [layers, T, K / 2] float32 gets the G of each position.
    """
    p, layer = tl.program_id(0), tl.program_id(1)
    line = tl.load(lines + p)
    if line < 0:
        return
    columns, gates = _ranks(table, line, RANKS)
    g = tl.arange(0, RANKS // 2)
    at = layer.to(tl.int64) * slice_step + p * RANKS + columns + g
    found = _added_up(u, splits, split_step, at, g < gates, tl.float32)
    place = (layer.to(tl.int64) * tl.num_programs(0) + p) * (RANKS // 2) + g
    tl.store(scores + place, found, mask=g < gates)


@triton.jit(do_not_specialize=["splits", "split_step", "slice_step"])
def gate(
    u,
    splits,
    split_step,
    slice_step,
    v,
    scores,
    counting,
    lines,
    table,
    counts,
    RANKS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """V of one position and one packed layer.

    u is what `shrink` wrote. v [layers, T, K] in the dtype of x gets the gated sums by position,
    up to R. If `counting` [1] is not 0, counts [L, K / 2] int32 grows by 1 for each member that is
    chosen. With `SPLIT`, u is of a part of the input, and scores [layers, T, K / 2] float32 of all
    of it.
    """
    p, layer = tl.program_id(0), tl.program_id(1)
    line = tl.load(lines + p)
    if line < 0:
        return
    columns, gates = _ranks(table, line, RANKS)
    weight = table + line * (HEAD + RANKS // 2 * 7) + HEAD
    here = layer.to(tl.int64) * slice_step + p * RANKS
    c = tl.arange(0, RANKS)
    own = c < columns
    dtype: tl.constexpr = v.dtype.element_ty
    found = _added_up(u, splits, split_step, here + c, own, dtype)
    # What `shrink` made of A's rows of constants and diagonals may be NaN: 0 times an infinite x.
    found = tl.where(c < tl.load(weight - 2), found, 1.0)
    factor = tl.load(weight + c, mask=own, other=0).to(tl.float32, bitcast=True)
    if gates > 0:
        member = tl.load(weight + RANKS + c, mask=own, other=-1)
        rows, count = weight + 2 * RANKS, counts + line * (RANKS // 2)
        place = (layer.to(tl.int64) * tl.num_programs(0) + p) * (RANKS // 2)
        grows = tl.load(counting)
        # A member has a column and a gate row. Most packs are small, as MeteoRA's 28.
        MOST: tl.constexpr = RANKS // 2
        FEW: tl.constexpr = 32 if MOST > 32 else MOST
        if gates <= FEW:
            factor *= _routes(
                u, splits, split_step, here + columns, scores + place, rows, gates, member, own,
                count, grows, dtype, RANKS, FEW, SPLIT,
            )  # fmt: skip
        elif MOST > FEW:
            factor *= _routes(
                u, splits, split_step, here + columns, scores + place, rows, gates, member, own,
                count, grows, dtype, RANKS, MOST, SPLIT,
            )  # fmt: skip
    tl.store(v + here + c, (found * factor).to(dtype), mask=own)


@triton.jit
def _part(v_lines, own, c, stop):
    """[TOKENS, COLUMNS] of v; 0 from the column `stop` on.

    Whole eights are loaded, in one access each, and what is not the set's own is thrown away.
    """
    eights = tl.cdiv(stop, 8) * 8
    found = tl.load(v_lines + c[None, :], mask=own[:, None] & (c[None, :] < eights), other=0.0)
    return tl.where(c[None, :] < stop, found, 0.0)


@triton.jit
def _right(b_slot, b_step, n, size, c, stop, room, ACROSS: tl.constexpr):
    """[COLUMNS, OUT] of B, transposed; 0 from the column `stop` on. Loads whole eights, too."""
    eights = tl.cdiv(stop, 8) * 8
    own = (n[None, :] < size) & (c[:, None] < eights) & (c[:, None] < room)
    place = c[:, None] * b_step + n[None, :] if ACROSS else n[None, :] * b_step + c[:, None]
    found = tl.load(b_slot + place, mask=own, other=0.0)
    return tl.where(c[:, None] < stop, found, 0.0)


@triton.jit(do_not_specialize=["slice_step"])
def expand(
    y,
    y_row,
    y_column,
    v,
    slice_step,
    b,
    b_slots,
    b_steps,
    room,
    sizes,
    tiles,
    tokens,
    table,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds to y what one tile adds in one block of output columns of one packed layer.

    y [T, Σ sizes] has rows `y_row` and columns `y_column` apart; each packed layer takes `sizes` of
    its columns, from the left. v is what `gate` wrote. b has per packed layer [slots, ≥ size,
    room ≥ R], slots `b_slots` apart, and `b_steps` apart rows; or, with `ACROSS`, columns.
    """
    slot, start, end, line = _tile(tiles, tl.program_id(0))
    if start >= end:
        return
    layer, block, left = 0, tl.program_id(1), 0
    for i in tl.static_range(len(sizes) - 1):
        blocks = tl.cdiv(sizes[i], OUT)
        if (layer == i) & (block >= blocks):
            layer, block, left = i + 1, block - blocks, left + sizes[i]
    size = _pick(sizes, layer)
    columns, _ = _ranks(table, line, RANKS)
    p, n = start + tl.arange(0, TOKENS), block * OUT + tl.arange(0, OUT)
    v_lines = v + tl.cast(layer, tl.int64) * slice_step + p[:, None] * RANKS
    b_slot, b_step = _pick(b, layer) + slot * _pick(b_slots, layer), _pick(b_steps, layer)
    total = tl.zeros((TOKENS, OUT), tl.float32)
    sums = tl.load(table + line * (HEAD + RANKS // 2 * 7) + 3)
    for first in range(0, sums, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        part = _part(v_lines, p < end, c, sums)
        right = _right(b_slot, b_step, n, size, c, sums, room, ACROSS)
        total = _dot(part, right, total, WIDE)
    token = tl.load(tokens + p, mask=p < end, other=0).to(tl.int64)
    out = y + token[:, None] * y_row + (left + n[None, :]).to(tl.int64) * y_column
    own = (p[:, None] < end) & (n[None, :] < size)
    dtype: tl.constexpr = y.dtype.element_ty
    found = tl.load(out, mask=own, other=0.0).to(tl.float32)
    if sums < columns:
        factor = tl.zeros((TOKENS, OUT), tl.float32)
        for first in range(sums // COLUMNS * COLUMNS, columns, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            part = _part(v_lines, p < end, c, columns)
            part = tl.where(c[None, :] >= sums, part, 0.0)
            right = _right(b_slot, b_step, n, size, c, columns, room, ACROSS)
            right = tl.where(c[:, None] >= sums, right, 0.0)
            factor = _dot(part, right, factor, WIDE)
        total += found * factor
    added = total.to(dtype).to(tl.float32)
    tl.store(out, (found + added).to(dtype), mask=own)
