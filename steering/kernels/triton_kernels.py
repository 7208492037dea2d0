"""The read-out on a GPU: four Triton kernels, which `steering.kernels.triton_mix` launches.

    first   every row and block of the vocabulary: z where the row's rule needs nothing of other
            blocks, else what it must know of this block
    narrow  nucleus rows, several times: a bracket around the lowest score of the nucleus, each
            time 16 times narrower
    finish  the rows and blocks that `first` left open
    tell    rows that report: KL to the base, and both most likely ids

A program works on one row and one block; programs meet only between launches, by tables that are
written and added up in a fixed order. There are no atomics: the same input gives the same bits.
Launch shapes depend on rows and vocabulary alone, so launches can be recorded in a graph.

Letters: R rows, V the base's vocabulary, S streams, B blocks of a row, E the ids that end a text, k
the stream that a row's rule reads. A name in capitals is known when a kernel is compiled: STREAMS
is S, bit i of PRESENT says whether stream i runs, BLOCKS is B up to the next power of two.

The tables hold one number per block, so that a row's total is one load and one sum:

    found   [R, S + LINES, B] float32: log Σ exp of each stream, then the lines named below
    bounds  [turns, R, 4] int32, the bracket of each turn: lowest key, highest, the probability
            above as float32, unused
    counts  [2, R, 2 WAYS, B] float32, by turns: inside the bracket, from each of 16 keys upwards,
            the probability; in the last turn also how many ids
    told    [R, 7, B] float32: log Σ exp of z, Σ softmax(z) (z − base) over the block, log Σ exp of
            the base, the largest of z, its id, the largest of the base, its id
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels import reference
from steering.kernels.triton_parts import (
    NEVER,
    NUCLEUS,
    PLAUSIBLE,
    WAYS,
    is_critical,
    is_steered,
    key_of,
    line_of,
    log_add,
    log_mass,
    log_sigmoid,
    marks_of,
    narrowed,
    picked,
    put,
    rule_of,
    scores_of,
    spread,
    streams_of,
    total_mass,
    weight_of,
)

SET_BACK = tl.constexpr(reference.SET_BACK)

TOP = tl.constexpr(0)
"""Line of `found`: the largest score of k."""
OTHERS, ENDS = tl.constexpr(1), tl.constexpr(2)
"""Log Σ exp of k outside of E, and on E."""
BEST, BEST_ID = tl.constexpr(3), tl.constexpr(4)
"""The largest score of k outside of E, and its id."""
SUM, SUM_ENDS = tl.constexpr(5), tl.constexpr(6)
"""Log Σ exp of the sum, outside of E and on E, over ids that no stream of it lacks."""
LACKS, LACKS_ENDS = tl.constexpr(7), tl.constexpr(8)
"""The same of the base over the other ids."""
OPEN = tl.constexpr(9)
"""1 where `first` left the block to `finish`, whatever the rule."""
LINES = tl.constexpr(10)


@triton.jit
def first(
    logits,
    steps,
    widths,
    rooms,
    places,
    marks,
    coef,
    coef_row,
    rule,
    rule_rows,
    ids,
    added,
    added_row,
    asks,
    asks_row,
    z,
    z_row,
    z_room,
    found,
    told,
    size,
    STREAMS: tl.constexpr,
    PRESENT: tl.constexpr,
    PLACED: tl.constexpr,
    MARKED: tl.constexpr,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    LACKING: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    REPORTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Z of a block if its row has a plain sum and no stream lacks an id; else what to know of it.

    logits: S tuples' worth of [n_i, widths] with rows `steps` apart and `rooms` readable numbers,
    of which row r is number `places` [R, S] int32. marks: see `marks_of`. coef, rule (kind, k,
    parameter, log-odds), ids and added, asks: float32, rows the given number apart.
    """
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    v = b * BLOCK + tl.arange(0, BLOCK)
    mark = marks_of(marks, v, MARKED)
    kind, k, param, odds = rule_of(rule, rule_rows, r, RULES, HEADS)
    steered = is_steered(
        coef, coef_row, kind, ids, added, added_row, r, STREAMS, CANDIDATES, PLACES
    )
    hard, soft = is_critical(kind, param, odds, HEADS)
    ruled = (kind == PLAUSIBLE) | (kind == NUCLEUS) | hard | soft
    whole = ~hard
    if not LACKING:
        whole = ~(hard | (kind == PLAUSIBLE))
    lines = found + tl.cast(r, tl.int64) * (STREAMS + LINES) * blocks + b
    total, _own, never, _own_never, lacking, raw, plain, chosen = streams_of(
        logits,
        steps,
        widths,
        rooms,
        places,
        mark,
        coef,
        coef_row,
        kind,
        k,
        r,
        v,
        whole,
        ruled,
        k != k,
        steered,
        lines,
        blocks,
        (kind == NUCLEUS) | LACKING,
        True,
        STREAMS,
        PRESENT,
        PLACED,
        HEADS,
    )
    # Padding is never drawn, so nothing of it is open.
    token = (v < size) & ((mark & 1) == 0)
    lacking = lacking & token
    lines += STREAMS * blocks
    opened = tl.max(lacking.to(tl.int32), 0)
    if LACKING:
        tl.store(lines + OPEN * blocks, opened.to(tl.float32))
    if RULES:  # noqa: SIM102 - decides what is compiled; the other, what runs
        if ruled:
            tl.store(lines + TOP * blocks, tl.max(chosen, 0))
    if HEADS:  # noqa: SIM102
        if hard | soft:
            ending = ((mark >> STREAMS) & 1) > 0
            outside = tl.where(ending, NEVER, chosen)
            best, best_id = tl.max(outside, 0, return_indices=True)
            tl.store(lines + OTHERS * blocks, log_mass(outside))
            tl.store(lines + ENDS * blocks, log_mass(tl.where(ending, chosen, NEVER)))
            tl.store(lines + BEST * blocks, best)
            tl.store(lines + BEST_ID * blocks, (b * BLOCK + best_id).to(tl.float32))
            summed = tl.where(never | lacking | ~token, NEVER, total)
            lacks = tl.where(lacking, plain, NEVER)
            tl.store(lines + SUM * blocks, log_mass(tl.where(ending, NEVER, summed)))
            tl.store(lines + SUM_ENDS * blocks, log_mass(tl.where(ending, summed, NEVER)))
            tl.store(lines + LACKS * blocks, log_mass(tl.where(ending, NEVER, lacks)))
            tl.store(lines + LACKS_ENDS * blocks, log_mass(tl.where(ending, lacks, NEVER)))
    if LACKING:
        ruled = ruled | (opened > 0)
    if ~ruled:
        put(
            z,
            z_row,
            z_room,
            tl.where(steered, tl.where(never | ~token, NEVER, total), raw),
            raw,
            ids,
            added,
            added_row,
            asks,
            asks_row,
            told,
            r,
            b,
            v,
            blocks,
            CANDIDATES,
            PLACES,
            REPORTS,
            BLOCK,
        )


@triton.jit
def narrow(
    logits,
    steps,
    widths,
    rooms,
    places,
    marks,
    rule,
    rule_rows,
    found,
    bounds,
    counts,
    turn,
    size,
    STREAMS: tl.constexpr,
    PLACED: tl.constexpr,
    MARKED: tl.constexpr,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What the keys of one turn have above them in one block of a nucleus row.

    Keys are scores as integers. The lowest key of the nucleus is the highest one from which on
    upwards the probability is at least p.
    """
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kind, k, p, _odds = rule_of(rule, rule_rows, r, True, False)
    if (kind != NUCLEUS) | (p >= 1):
        return
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
        low = key_of(mass + tl.log((1 - p) / size) - 0.01, SHIFT).to(tl.int64)
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
    place = tl.cast(r, tl.int64)
    if PLACED:
        place = tl.where(k == 0, place, tl.load(places + r * STREAMS + k).to(tl.int64))
    s = scores_of(
        picked(logits, k), picked(steps, k), picked(widths, k), picked(rooms, k), place, v, wanted
    )
    s = tl.where(((marks_of(marks, v, MARKED) >> k) & 1) > 0, NEVER, s)
    key = key_of(s, SHIFT)
    inside = spread(wanted, v) & (key <= high)
    way = tl.arange(0, WAYS)
    keys = (low + way * ((high - low) // WAYS + 1)).to(tl.int32)
    reached = inside[:, None] & (key[:, None] >= keys[None, :])
    p_of = tl.exp(s - mass)
    at = counts + here + way * blocks + b
    tl.store(at, tl.sum(tl.where(reached, p_of[:, None], 0.0), 0))
    if LAST:
        tl.store(at + WAYS * blocks, tl.sum(reached.to(tl.float32), 0))


@triton.jit
def finish(
    logits,
    steps,
    widths,
    rooms,
    places,
    marks,
    coef,
    coef_row,
    rule,
    rule_rows,
    ids,
    added,
    added_row,
    asks,
    asks_row,
    z,
    z_row,
    z_room,
    found,
    told,
    bounds,
    counts,
    turns,
    size,
    STREAMS: tl.constexpr,
    PRESENT: tl.constexpr,
    PLACED: tl.constexpr,
    MARKED: tl.constexpr,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    LACKING: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    REPORTS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Z of a block that `first` left open, from what is known of all blocks of its row."""
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kind, k, param, odds = rule_of(rule, rule_rows, r, RULES, HEADS)
    hard, soft = is_critical(kind, param, odds, HEADS)
    plausible, nucleus = kind == PLAUSIBLE, kind == NUCLEUS
    ruled = plausible | nucleus | hard | soft
    lines = found + tl.cast(r, tl.int64) * (STREAMS + LINES) * blocks
    rest = lines + STREAMS * blocks
    opened = kind == NEVER
    if LACKING:
        opened = tl.load(rest + OPEN * blocks + b) > 0
    if ~(ruled | opened):
        return
    # What is raw in the sum, what is normalised there, and the base, all as log Σ exp.
    offset, normal = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    base_mass = tl.full((), 0, tl.float32)
    for i in tl.static_range(STREAMS):
        if (PRESENT >> i) & 1:
            c = weight_of(coef, coef_row, r, kind, k, i, HEADS)
            if (c != 0) & (nucleus | (~hard & LACKING)):
                mass = total_mass(lines, i, blocks, BLOCKS)
                apart = nucleus & (k != i)
                offset += tl.where(apart, 0.0, c * mass)
                normal += tl.where(apart, c * mass, 0.0)
                if i == 0:
                    base_mass = mass
    no_delta = tl.where(
        weight_of(coef, coef_row, r, kind, k, 0, HEADS) > 0, offset - base_mass, NEVER
    )
    whole, floor, cut = ~hard, tl.full((), NEVER, tl.float32), tl.full((), 0, tl.int64)
    above, ties, own_mass = floor, floor, floor
    filtered = nucleus & (param < 1)
    if RULES:
        top = tl.load(rest + TOP * blocks + b)
        if plausible:
            floor = tl.max(line_of(rest, TOP, blocks, BLOCKS), 0) + tl.log(param)
            whole = ~(top < floor)
        if filtered:
            rows = tl.num_programs(0)
            turn = turns - 1
            counts += tl.cast(turn % 2 * rows + r, tl.int64) * 2 * WAYS * blocks
            bounds += (turn * rows + r) * 4
            cut, _high, above, way = narrowed(bounds, counts, blocks, param, BLOCKS)
            # In blocks before this one, how many ids have just that score.
            n = tl.arange(0, BLOCKS)
            many = tl.maximum(line_of(counts, WAYS + way, blocks, BLOCKS), 0.0)
            fewer = tl.maximum(
                line_of(counts, tl.minimum(WAYS + way + 1, 2 * WAYS - 1), blocks, BLOCKS), 0.0
            )
            many -= tl.where(way == WAYS - 1, 0.0, fewer)
            ties = tl.sum(tl.where(n < b, many, 0.0), 0)
            own_mass = total_mass(lines, k, blocks, BLOCKS)
            whole = opened | (key_of(top, SHIFT) >= cut)
    base = kind == NEVER
    if REPORTS:
        base = tl.load(asks + r * asks_row) != 0
    v = b * BLOCK + tl.arange(0, BLOCK)
    mark = marks_of(marks, v, MARKED)
    total, own, never, own_never, lacking, raw, plain, chosen = streams_of(
        logits,
        steps,
        widths,
        rooms,
        places,
        mark,
        coef,
        coef_row,
        kind,
        k,
        r,
        v,
        whole,
        ruled,
        base,
        k == k,
        lines,
        blocks,
        False,
        False,
        STREAMS,
        PRESENT,
        PLACED,
        HEADS,
    )
    inside = v >= 0
    if RULES:  # noqa: SIM102 - decides what is compiled; the other, what runs
        if filtered:
            key = key_of(chosen, SHIFT)
            tie = key == cut
            before = ties + (tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)).to(tl.float32)
            mass = above + before * tl.exp(chosen - own_mass)
            inside = (key > cut) | (tie & (mass < param))
    scores = own + tl.where(inside, total - normal, 0.0)
    scores = tl.where(own_never | (inside & never), NEVER, scores)
    if LACKING:
        scores = tl.where(lacking, plain + no_delta, scores)
    scores = tl.where(chosen < floor, NEVER, scores)
    if HEADS:
        ending = ((mark >> STREAMS) & 1) > 0
        if hard | soft:
            others = total_mass(rest, OTHERS, blocks, BLOCKS)
            if hard:
                values = line_of(rest, BEST, blocks, BLOCKS)
                best_at = tl.argmax(values, 0)
                n = tl.arange(0, BLOCKS)
                best_ids = line_of(rest, BEST_ID, blocks, BLOCKS)
                best = tl.sum(tl.where(n == best_at, best_ids, 0.0), 0).to(tl.int32)
                both = log_add(others, total_mass(rest, ENDS, blocks, BLOCKS))
                behind = tl.where(v == best, 0.0, SET_BACK)
                scores = chosen - tl.where(ending, both + 2 * SET_BACK, others + behind)
            else:
                ours = total_mass(rest, SUM, blocks, BLOCKS)
                ours_ends = total_mass(rest, SUM_ENDS, blocks, BLOCKS)
                if LACKING:
                    more = total_mass(rest, LACKS, blocks, BLOCKS) + no_delta
                    ours = log_add(ours, more)
                    more = total_mass(rest, LACKS_ENDS, blocks, BLOCKS) + no_delta
                    ours_ends = log_add(ours_ends, more)
                both = log_add(ours, ours_ends)
                aligned = scores - both
                theirs = chosen - others + (ours - both)
                mixed = log_add(log_sigmoid(-odds) + aligned, log_sigmoid(odds) + theirs)
                scores = tl.where(ending, aligned, mixed)
    token = (v < size) & ((mark & 1) == 0)
    put(
        z,
        z_row,
        z_room,
        tl.where(token, scores, NEVER),
        raw,
        ids,
        added,
        added_row,
        asks,
        asks_row,
        told,
        r,
        b,
        v,
        blocks,
        CANDIDATES,
        PLACES,
        REPORTS,
        BLOCK,
    )


@triton.jit
def tell(asks, asks_row, told, numbers, choices, blocks, BLOCKS: tl.constexpr):
    """What a row's report says, from its blocks.

    numbers [R, 3] float32: KL(z ‖ base) in nats, log Σ exp of z, of the base. choices [R, 2] int32:
    the most likely id of the base, and of z.
    """
    r = tl.program_id(0)
    if tl.load(asks + r * asks_row) == 0:
        return
    lines = told + tl.cast(r, tl.int64) * 7 * blocks
    masses = line_of(lines, 0, blocks, BLOCKS)
    mass, base_mass = log_mass(masses), total_mass(lines, 2, blocks, BLOCKS)
    share = tl.exp(masses - tl.where(mass > NEVER, mass, 0.0))
    gap = tl.sum(tl.where(share > 0, share * line_of(lines, 1, blocks, BLOCKS), 0.0), 0)
    tl.store(numbers + r * 3, gap - mass + base_mass)
    tl.store(numbers + r * 3 + 1, mass)
    tl.store(numbers + r * 3 + 2, base_mass)
    n = tl.arange(0, BLOCKS)
    best = tl.argmax(line_of(lines, 3, blocks, BLOCKS), 0)
    base = tl.argmax(line_of(lines, 5, blocks, BLOCKS), 0)
    of_base = tl.where(n == base, line_of(lines, 6, blocks, BLOCKS), 0.0)
    of_z = tl.where(n == best, line_of(lines, 4, blocks, BLOCKS), 0.0)
    tl.store(choices + r * 2, tl.sum(of_base, 0).to(tl.int32))
    tl.store(choices + r * 2 + 1, tl.sum(of_z, 0).to(tl.int32))
