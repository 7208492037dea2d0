"""The second launch of the read-out: z where `first` could not know it.

Letters and tables: `steering.kernels.triton_kernels`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels import reference
from steering.kernels.triton_nucleus import end_of_nucleus, inside_nucleus
from steering.kernels.triton_parts import (
    BEST,
    BEST_ID,
    DEEP,
    DOUBT,
    ENDS,
    HEAD,
    HIGH,
    LACKS,
    LACKS_DEEP,
    LACKS_ENDS,
    LACKS_HIGH,
    LINES,
    NEVER,
    NUCLEUS,
    OPEN,
    OTHERS,
    PLAUSIBLE,
    SELECT,
    STREAM_ENDS_TEXT,
    SUM,
    SUM_ENDS,
    SUM_ENDS_TEXT,
    TOP,
    count_of,
    ending_of,
    key_of,
    line_of,
    log_add,
    log_sigmoid,
    marks_of,
    put,
    rule_of,
    selects,
    spread,
    streams_of,
    total_mass,
    weight_of,
)

SET_BACK = tl.constexpr(reference.SET_BACK)


@triton.jit
def set_back_by(lines, no_delta, blocks, LACKING: tl.constexpr, BLOCKS: tl.constexpr):
    """How much lower implausible ids are: by `SET_BACK` more than the scores of the sum differ."""
    high = tl.max(line_of(lines, HIGH, blocks, BLOCKS), 0)
    deep = tl.max(line_of(lines, DEEP, blocks, BLOCKS), 0)
    if LACKING:
        high = tl.maximum(high, tl.max(line_of(lines, LACKS_HIGH, blocks, BLOCKS), 0) + no_delta)
        deep = tl.maximum(deep, tl.max(line_of(lines, LACKS_DEEP, blocks, BLOCKS), 0) - no_delta)
    return SET_BACK + high + deep


@triton.jit
def select_scores(
    lines,
    rules,
    r,
    param,
    scores,
    chosen,
    v,
    no_delta,
    blocks,
    LACKING: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A block of a `SELECT` row: `scores` is the sum without k."""
    gate, hard, ender, best_only, odds = selects(rules, r)
    barred = ending_of(rules, r, v) & spread(ender == SUM_ENDS_TEXT, v)
    others = total_mass(lines, OTHERS, blocks, BLOCKS)
    ours = total_mass(lines, SUM, blocks, BLOCKS)
    ours_ends = total_mass(lines, SUM_ENDS, blocks, BLOCKS)
    high = tl.max(line_of(lines, HIGH, blocks, BLOCKS), 0)
    high_ends = tl.max(line_of(lines, DEEP, blocks, BLOCKS), 0)
    if LACKING:
        ours = log_add(ours, total_mass(lines, LACKS, blocks, BLOCKS) + no_delta)
        lacks_ends = total_mass(lines, LACKS_ENDS, blocks, BLOCKS)
        ours_ends = log_add(ours_ends, lacks_ends + no_delta)
        high = tl.maximum(high, tl.max(line_of(lines, LACKS_HIGH, blocks, BLOCKS), 0) + no_delta)
        lacks_high_ends = tl.max(line_of(lines, LACKS_DEEP, blocks, BLOCKS), 0)
        high_ends = tl.maximum(high_ends, lacks_high_ends + no_delta)
    scale = log_add(ours, ours_ends)
    top = tl.minimum(tl.maximum(high, high_ends) - scale, 0.0)
    head, doubt = gate == HEAD, gate == DOUBT
    found = (1.0 / (1.0 + tl.exp(-odds)) > param) | ((param <= 0) & ~hard)
    found = tl.where(doubt, tl.exp(top) < param, found | ~head)
    found = found | ((ender == STREAM_ENDS_TEXT) & (high_ends > high))
    if found:
        if hard:
            n = tl.arange(0, BLOCKS)
            best_block = tl.argmax(line_of(lines, BEST, blocks, BLOCKS), 0)
            best_ids = line_of(lines, BEST_ID, blocks, BLOCKS)
            best = tl.sum(tl.where(n == best_block, best_ids, 0.0), 0).to(tl.int32)
            both = log_add(others, total_mass(lines, ENDS, blocks, BLOCKS))
            behind = tl.where((v != best) & spread(best_only, v), SET_BACK, 0.0)
            only = chosen + (scale - tl.where(barred, both + 2 * SET_BACK, others + behind))
            scores = tl.where(chosen == NEVER, scores - 3 * SET_BACK, only)
        else:
            of_doubt = tl.log(1.0 - tl.exp(top))
            log_q = tl.where(head, log_sigmoid(odds), tl.where(doubt, of_doubt, tl.log(param)))
            rest = tl.where(doubt, top, tl.log(tl.abs(1.0 - param)))
            rest = tl.where(head, log_sigmoid(-odds), rest)
            mixed = log_add(rest + scores, log_q + chosen + (ours - others))
            scores = tl.where(barred, scores, mixed)
    return scores


@triton.jit
def finish(
    source,
    coef,
    rules,
    more,
    reported,
    out,
    found,
    bounds,
    counts,
    turns,
    size,
    STREAMS: tl.constexpr,
    MARKED: tl.constexpr,
    RULES: tl.constexpr,
    LACKING: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    REPORTS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Z of a block that `first` left open, from what is known of all blocks of its row.

    Arguments as of `triton_kernels.first`.
    """
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kind, k, param = rule_of(rules, r, RULES)
    plausible, nucleus, select = kind == PLAUSIBLE, kind == NUCLEUS, kind == SELECT
    ruled = plausible | nucleus | select
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
        c = weight_of(coef, r, kind, k, i)
        if (c != 0) & (nucleus | LACKING):
            mass = total_mass(lines, i, blocks, BLOCKS)
            apart = nucleus & (k != i)
            offset += tl.where(apart, 0.0, c * mass)
            normal += tl.where(apart, c * mass, 0.0)
    if LACKING:
        base_mass = total_mass(lines, 0, blocks, BLOCKS)
    back = tl.where(weight_of(coef, r, kind, k, 0) > 0, 0.0, SET_BACK)
    no_delta = offset - base_mass - back
    whole, floor, cut = kind == kind, tl.full((), NEVER, tl.float32), tl.full((), 0, tl.int64)
    above, ties, own_mass = floor, floor, floor
    implausible = tl.full((), 0, tl.float32)
    filtered, several = nucleus & (param < 1), kind == NEVER
    many = tl.full((), 1, tl.float32)
    if RULES:
        top = tl.load(rest + TOP * blocks + b)
        if plausible:
            floor = tl.max(line_of(rest, TOP, blocks, BLOCKS), 0) + tl.log(param)
            implausible = set_back_by(rest, no_delta, blocks, LACKING, BLOCKS)
            many = count_of(rules, r, size)
            several = many > 1
        if filtered | several:
            target = tl.where(several, many, param)
            cut, above, ties = end_of_nucleus(counts, bounds, turns, r, b, blocks, target, BLOCKS)
        if filtered:
            own_mass = total_mass(lines, k, blocks, BLOCKS)
            whole = opened | (key_of(top, SHIFT) >= cut)
    base = kind == NEVER
    if LACKING:
        base = kind == kind
    elif REPORTS:
        base = tl.load(reported + r) != 0
    v = b * BLOCK + tl.arange(0, BLOCK)
    mark = marks_of(source, v, MARKED)
    total, own, never, own_never, lacking, raw, plain, chosen = streams_of(
        source,
        mark,
        coef,
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
    )
    inside = v >= 0
    if RULES:  # noqa: SIM102 - decides what is compiled; the other, what runs
        if filtered:
            inside = inside_nucleus(chosen, own_mass, cut, above, ties, param, SHIFT)
    scores = own + tl.where(inside, total - normal, 0.0)
    scores = tl.where(own_never | (inside & never), NEVER, scores)
    if LACKING:
        scores = tl.where(lacking, plain + no_delta, scores)
    kept = chosen >= floor
    if RULES:
        kept = kept | (spread(several, v) & (key_of(chosen, SHIFT) >= cut))
    scores = tl.where(spread(plausible, v) & ~kept, scores - implausible, scores)
    if RULES:  # noqa: SIM102
        if select:
            scores = select_scores(
                rest, rules, r, param, scores, chosen, v, no_delta, blocks, LACKING, BLOCKS
            )
    token = (v < size) & ((mark & 1) == 0)
    put(
        out,
        tl.where(token, scores, NEVER),
        raw,
        more,
        reported,
        r,
        b,
        v,
        blocks,
        CANDIDATES,
        PLACES,
        REPORTS,
        BLOCK,
    )
