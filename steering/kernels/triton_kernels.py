"""The read-out on a GPU: four Triton kernels, which `steering.kernels.triton_mix` launches.

    first   every row and block of the vocabulary: z where the row's rule needs nothing of other
            blocks, else what it must know of this block
    narrow  nucleus rows, several times: a bracket around the lowest score of the nucleus, each
            time 16 times narrower (`triton_nucleus`)
    finish  the rows and blocks that `first` left open (`triton_finish`)
    compare rows that report: KL to the base, and both most likely ids

A program works on one row and one block; programs meet only between launches, by tables that are
written and added up in a fixed order. There are no atomics: the same input gives the same bits.
Launch shapes depend on rows and vocabulary alone, so launches can be recorded in a graph.

Letters: R rows, V the base's vocabulary, S streams, B blocks of a row, E the ids that end a text, k
the stream that a row's rule reads. A name in capitals is known when a kernel is compiled: STREAMS
is S, BLOCKS is B up to the next power of two.

The tables hold one number per block, so that a row's total is one load and one sum:

    found   [R, S + LINES, B] float32: log Σ exp of each stream, then the lines that
            `triton_parts` names
    bounds  [turns, R, 4] int32, the bracket of each turn: lowest key, highest, the probability
            above as float32, unused
    counts  [2, R, 2 WAYS, B] float32, by turns: inside the bracket, from each of 16 keys upwards,
            the probability; in the last turn also how many ids
    measured [R, 7, B] float32: log Σ exp of z, Σ softmax(z) (z − base) over the block, log Σ exp of
            the base, the largest of z, its id, the largest of the base, its id
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# What a kernel's names stand for is Triton's to decide: they are traced, not run.

from __future__ import annotations

import triton
import triton.language as tl

from steering.kernels.triton_parts import (
    BEST,
    BEST_ID,
    DEEP,
    ENDS,
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
    SUM,
    SUM_ENDS,
    SUM_ENDS_TEXT,
    TOP,
    ending_of,
    is_steered,
    line_of,
    log_mass,
    marks_of,
    put,
    rule_of,
    selects,
    spread,
    streams_of,
    total_mass,
)


@triton.jit
def first(
    source,
    coef,
    rules,
    more,
    reported,
    out,
    found,
    size,
    STREAMS: tl.constexpr,
    MARKED: tl.constexpr,
    RULES: tl.constexpr,
    LACKING: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    REPORTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Z of a block if its row has a plain sum and no stream lacks an id; else what to know of it.

    Arguments that go together are tuples, made in `triton_mix`: `source` = (logits, steps, widths,
    rooms, marks), S tensors [R, widths] with rows `steps` apart and `rooms` readable numbers, and
    for marks see `marks_of`; `rules` = (kind, k, parameter, count, options, log-odds, set of ends)
    and their rows' distances, then the sets [n, ≥ B BLOCK] uint8 and their distance; `coef` and
    `more` (ids and what is added to them), float32, each with its rows' distance; `reported` [R]
    float32, not 0 where a row reports; `out` = (z, its rows' distance, numbers in a row that may be
    written, measured).
    """
    r, b, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    v = b * BLOCK + tl.arange(0, BLOCK)
    mark = marks_of(source, v, MARKED)
    kind, k, _param = rule_of(rules, r, RULES)
    steered = is_steered(coef, kind, more, r, STREAMS, CANDIDATES, PLACES)
    ruled = (kind == PLAUSIBLE) | (kind == NUCLEUS) | (kind == SELECT)
    base = kind == NEVER
    if LACKING:  # what an id gets that a stream lacks is the base's to say
        base = kind == kind
    elif REPORTS:
        base = tl.load(reported + r) != 0
    lines = found + tl.cast(r, tl.int64) * (STREAMS + LINES) * blocks + b
    total, _own, never, _own_never, lacking, raw, plain, chosen = streams_of(
        source,
        mark,
        coef,
        kind,
        k,
        r,
        v,
        kind == kind,
        ruled,
        base,
        steered,
        lines,
        blocks,
        (kind == NUCLEUS) | LACKING,
        True,
        STREAMS,
    )
    # Padding is never drawn, so nothing of it is open.
    token = (v < size) & ((mark & 1) == 0)
    lacking = lacking & token
    lines += STREAMS * blocks
    opened = tl.max(lacking.to(tl.int32), 0)
    if LACKING:
        tl.store(lines + OPEN * blocks, opened.to(tl.float32))
    summed = tl.where(never | lacking | ~token, NEVER, total)
    lacks = tl.where(lacking, plain, NEVER)
    if RULES:
        if ruled:
            tl.store(lines + TOP * blocks, tl.max(chosen, 0))
        if kind == PLAUSIBLE:
            tl.store(lines + HIGH * blocks, tl.max(summed, 0))
            tl.store(lines + DEEP * blocks, tl.max(tl.where(summed > NEVER, -summed, NEVER), 0))
            tl.store(lines + LACKS_HIGH * blocks, tl.max(lacks, 0))
            tl.store(lines + LACKS_DEEP * blocks, tl.max(tl.where(lacks > NEVER, -lacks, NEVER), 0))
        if kind == SELECT:
            _gate, _hard, ender, _best, _odds = selects(rules, r)
            ends = ending_of(rules, r, v)
            tl.store(lines + HIGH * blocks, tl.max(tl.where(ends, NEVER, summed), 0))
            tl.store(lines + DEEP * blocks, tl.max(tl.where(ends, summed, NEVER), 0))
            tl.store(lines + LACKS_HIGH * blocks, tl.max(tl.where(ends, NEVER, lacks), 0))
            tl.store(lines + LACKS_DEEP * blocks, tl.max(tl.where(ends, lacks, NEVER), 0))
            barred = ends & spread(ender == SUM_ENDS_TEXT, v)
            outside = tl.where(barred, NEVER, chosen)
            best, best_id = tl.max(outside, 0, return_indices=True)
            tl.store(lines + OTHERS * blocks, log_mass(outside))
            tl.store(lines + ENDS * blocks, log_mass(tl.where(barred, chosen, NEVER)))
            tl.store(lines + BEST * blocks, best)
            tl.store(lines + BEST_ID * blocks, (b * BLOCK + best_id).to(tl.float32))
            tl.store(lines + SUM * blocks, log_mass(tl.where(barred, NEVER, summed)))
            tl.store(lines + SUM_ENDS * blocks, log_mass(tl.where(barred, summed, NEVER)))
            tl.store(lines + LACKS * blocks, log_mass(tl.where(barred, NEVER, lacks)))
            tl.store(lines + LACKS_ENDS * blocks, log_mass(tl.where(barred, lacks, NEVER)))
    if LACKING:
        ruled = ruled | (opened > 0)
    if ~ruled:
        put(
            out,
            tl.where(steered, tl.where(never | ~token, NEVER, total), raw),
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


@triton.jit
def compare(reported, measured, numbers, choices, blocks, BLOCKS: tl.constexpr):
    """A row's report, from its blocks.

    numbers [3, R] float32: KL(z ‖ base) in nats, log Σ exp of z, of the base. choices [2, R] int64:
    the most likely id of z, and of the base.
    """
    r, rows = tl.program_id(0), tl.num_programs(0)
    if tl.load(reported + r) == 0:
        return
    lines = measured + tl.cast(r, tl.int64) * 7 * blocks
    masses = line_of(lines, 0, blocks, BLOCKS)
    mass, base_mass = log_mass(masses), total_mass(lines, 2, blocks, BLOCKS)
    share = tl.exp(masses - tl.where(mass > NEVER, mass, 0.0))
    gap = tl.sum(tl.where(share > 0, share * line_of(lines, 1, blocks, BLOCKS), 0.0), 0)
    tl.store(numbers + r, gap - mass + base_mass)
    tl.store(numbers + rows + r, mass)
    tl.store(numbers + 2 * rows + r, base_mass)
    n = tl.arange(0, BLOCKS)
    best = tl.argmax(line_of(lines, 3, blocks, BLOCKS), 0)
    base = tl.argmax(line_of(lines, 5, blocks, BLOCKS), 0)
    of_base = tl.where(n == base, line_of(lines, 6, blocks, BLOCKS), 0.0)
    of_z = tl.where(n == best, line_of(lines, 4, blocks, BLOCKS), 0.0)
    tl.store(choices + r, tl.sum(of_z, 0).to(tl.int64))
    tl.store(choices + rows + r, tl.sum(of_base, 0).to(tl.int64))
