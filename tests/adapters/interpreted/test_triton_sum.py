"""The Triton kernels against the definition, over sizes that hurt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adapters.kernels import gated
from adapters.kernels.gated import InPlace
from adapters.kernels.lines import Lines
from adapters.kernels.reference import Float
from adapters.kernels.triton_sum import AdapterTables, add_adapters
from tests.adapters.mixed import KINDS, Ask, Layer, Part, Set, gates, line, over_ranks
from tests.adapters.steps import SETS, TOLERANCE, asked, step
from tests.tiers import mostly_nightly


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so what a kernel reads before it was written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def added(
    layer: Layer, x: Float, lines: Lines, tables: AdapterTables | None = None
) -> torch.Tensor:
    """[T, Σ sizes] by the kernels; rows without an adapter are checked to have the base's bits."""
    y = layer.base(x)
    base = y.clone()
    if tables is None:
        tables = AdapterTables(y.device, len(x) + 3, 20, layer.slots, layer.room)
        tables.write(lines, len(x))
    inputs = torch.from_numpy(x).to(layer.dtype)
    add_adapters(y, inputs, layer.a, layer.b, layer.sizes, tables)
    bare = np.setdiff1d(np.arange(len(x)), np.flatnonzero(lines.tokens >= 0))
    assert torch.equal(y[bare], base[bare])
    return y


def close(y: torch.Tensor, want: Float) -> None:
    """Within the dtype's tolerance, as a share of the largest value."""
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    assert np.abs(y.double().numpy() - want).max(initial=0) <= TOLERANCE[y.dtype] * scale


@pytest.mark.parametrize("dtype", mostly_nightly(TOLERANCE, [torch.bfloat16]))
@pytest.mark.parametrize(
    ("tokens", "into", "sizes"),
    [
        (1, 1, (1,)),
        (1, 300, (31, 130)),
        (2, 129, (257,)),
        (2, 64, (64, 32, 32)),
        (33, 7, (5, 3, 3)),
        (33, 129, (70,)),
        (140, 7, (5, 3, 3)),
    ],
)
def test_requests_of_all_kinds_in_one_batch(
    tokens: int, into: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = Layer(into, sizes, SETS, dtype, seed=tokens, across=into % 2 == 1)
    lines, asks = step(layer, tokens, 9, bare=0.3 if tokens > 1 else 0.0)
    x = layer.draw(tokens, into)
    close(added(layer, x, lines), layer.wanted(x, lines, asks))


@pytest.mark.parametrize("dtype", mostly_nightly(TOLERANCE, [torch.bfloat16]))
@pytest.mark.parametrize(
    ("tokens", "into", "sizes"), [(2, 64, (31, 130)), (33, 7, (5, 3, 3)), (140, 33, (70,))]
)
def test_constants_and_diagonals_beside_products(
    tokens: int, into: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = Layer(into, sizes, KINDS, dtype, seed=tokens, across=into % 2 == 1)
    lines, asks = step(layer, tokens, 12)
    x = layer.draw(tokens, into)
    y = added(layer, x, lines)
    close(y, layer.wanted(x, lines, asks))
    # What a request gets does not depend on whom it shares the batch with.
    plain = lines.slots[np.maximum(lines.tokens, 0)] == 0
    alone = Lines(lines.lines, lines.slots, np.where(plain, lines.tokens, -1).astype(np.int32))
    rows = np.flatnonzero(plain & (lines.tokens >= 0))
    assert torch.equal(added(layer, x, alone)[rows], y[rows])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("into", [1, 64])
def test_gates_that_look_at_all_of_x(into: int, across: bool) -> None:
    layer = Layer(into, (9, 4), SETS, torch.float32, seed=into, exact=False, across=across)
    lines, asks = step(layer, 24, 9)
    x = layer.draw(24, into)
    close(added(layer, x, lines), layer.wanted(x, lines, asks))


def test_many_tokens_of_two_sets_and_a_few_of_others() -> None:
    layer = Layer(32, (16,), SETS, torch.float32, seed=5)
    asks = [asked(layer.random, layer.sets[slot]) for slot in SETS]
    made = tuple(line(layer.sets[slot], ask) for slot, ask in zip(SETS, asks, strict=True))
    own = np.full(1100, -1)
    own[:501], own[600:602], own[700], own[1000:] = 2, 0, 1, 3
    lines = Lines(made, np.array(list(SETS), np.int32), own.astype(np.int32))
    x = layer.draw(1100, 32)
    close(added(layer, x, lines), layer.wanted(x, lines, asks))


def test_a_pack_as_large_as_the_released_one() -> None:
    """28 members of rank 8 need 252 rank indices; the slot has 256."""
    parts: Set = (Part((8,) * 28, routed=True),)
    layer = Layer(96, (40, 24), {1: parts}, torch.float32, slots=2, room=256, seed=6)
    asks = [[Ask(1.0, 2, 15.0)], [Ask(0.5, 28, 1.0)], [Ask(-1.0, 1, 1.0)]]
    made = tuple(line(parts, ask) for ask in asks)
    own = np.array([0, 1, 2, -1, 2, 1, 0, 0], np.int32)
    lines = Lines(made, np.ones(3, np.int32), own)
    x = layer.draw(8, 96)
    close(added(layer, x, lines), layer.wanted(x, lines, asks))


def test_more_members_than_a_released_pack() -> None:
    parts: Set = (Part((1,) * 33, routed=True), Part((2,) * 17, routed=True))
    layer = Layer(64, (12,), {0: parts}, torch.float32, slots=1, room=128, seed=7, exact=False)
    asks = [[Ask(1.0, 3, 2.0), Ask(0.5, 17, 20.0)], [Ask(0.0), Ask(1.0, 5, 1.0)]]
    lines = Lines(
        tuple(line(parts, ask) for ask in asks), np.zeros(2, np.int32), np.arange(2, dtype=np.int32)
    )
    x = layer.draw(2, 64)
    close(added(layer, x, lines), layer.wanted(x, lines, asks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_the_torch_path(dtype: torch.dtype) -> None:
    layer = Layer(48, (20, 11), {2: SETS[2]}, dtype, seed=8)
    ranks, top_k, temperature, weight = SETS[2][1].ranks, 2, 4.0, 0.6
    own = layer.random.integers(-1, 1, 30).astype(np.int32)
    x = layer.draw(30, 48)
    asks = [[Ask(-0.4), Ask(weight, top_k, temperature)]]
    y = added(layer, x, Lines((line(SETS[2], asks[0]),), np.array([2], np.int32), own))
    tokens = torch.from_numpy(np.flatnonzero(own >= 0))
    each = torch.ones(len(tokens))
    route = gated.Route(
        slice(2, 11),
        slice(11, 16),
        torch.from_numpy(np.repeat(np.arange(5), ranks)),
        each * weight,
        (each * top_k).long(),
        top_k,
        each * temperature,
    )
    gate = torch.ones(len(tokens), 11)
    gate[:, :2] = -0.4
    torch_y = layer.base(x)
    group = gated.Group(2, tokens, 11, 16, gate, (route,))
    inputs = torch.from_numpy(x).to(dtype)
    gated.add_adapters(torch_y, inputs, layer.a, layer.b, layer.sizes, [group])
    close(y, torch_y.double().numpy())


@pytest.mark.parametrize("dtype", mostly_nightly(TOLERANCE, [torch.bfloat16]))
@pytest.mark.parametrize("cut", [[0, 30, 70], [0, 1, 30, 70]])
def test_ranks_that_see_parts_of_the_input(cut: list[int], dtype: torch.dtype) -> None:
    """Their outputs add up to the layer's: gates choose by the scores of the whole input."""
    layer = Layer(70, (18, 7), KINDS | {2: SETS[2]}, dtype, seed=15)
    lines, asks = step(layer, 30, 9)
    x = layer.draw(30, 70)
    parts = [layer.part(start, stop) for start, stop in itertools.pairwise(cut)]
    tables = AdapterTables(torch.device("cpu"), 30, 9, layer.slots, layer.room)

    def run(rank: int, sum_scores: InPlace) -> torch.Tensor:
        own, part = x[:, cut[rank] : cut[rank + 1]], parts[rank]
        y, inputs = part.base(own), torch.from_numpy(own).to(dtype)
        tables.write(lines, 30)
        add_adapters(y, inputs, part.a, part.b, part.sizes, tables, sum_scores)
        return y

    want = layer.wanted(x, lines, asks)
    scale = max(1.0, float(np.abs(want).max()))
    y = over_ranks(len(parts), run)
    assert np.abs(y.numpy() - want).max() <= 2 * TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", mostly_nightly(TOLERANCE, [torch.bfloat16]))
def test_a_rows_bits_do_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    layer = Layer(70, (18, 7), SETS, dtype, seed=9)
    lines, _ = step(layer, 30, 6)
    x = layer.draw(30, 70)
    together = added(layer, x, lines)
    for number in range(0, 6, 2):
        alone = np.where(lines.tokens == number, number, -1)
        y = added(layer, x, Lines(lines.lines, lines.slots, alone))
        mine = np.flatnonzero(alone >= 0)
        assert torch.equal(y[mine], together[mine])


def test_tables_are_written_again_and_again() -> None:
    """Longer, shorter and empty steps by turns: nothing of an earlier one is read."""
    layer = Layer(16, (10, 6), SETS, torch.float32, seed=10)
    tables = AdapterTables(torch.device("cpu"), 130, 12, layer.slots, layer.room)
    for tokens, requests, bare in ((130, 12, 0.0), (3, 1, 0.0), (40, 5, 1.0), (129, 3, 0.9)):
        lines, asks = step(layer, tokens, requests, bare)
        x = layer.draw(tokens, 16)
        tables.write(lines, tokens)
        close(added(layer, x, lines, tables), layer.wanted(x, lines, asks))


def test_padding_is_left_alone() -> None:
    layer = Layer(16, (10,), SETS, torch.float32, seed=11)
    lines, asks = step(layer, 20, 4)
    tables = AdapterTables(torch.device("cpu"), 64, 4, layer.slots, layer.room)
    tables.write(lines, 32)
    x = layer.draw(32, 16)
    padded = Lines(lines.lines, lines.slots, np.pad(lines.tokens, (0, 12), constant_values=-1))
    close(added(layer, x, padded, tables), layer.wanted(x, padded, asks))


def test_twins_use_the_same_slots_with_gates_of_their_own() -> None:
    layer = Layer(16, (10,), SETS, torch.float32, seed=12)
    mine, theirs = step(layer, 20, 4), step(layer, 20, 4)
    x = layer.draw(20, 16)
    both = [AdapterTables(torch.device("cpu"), 20, 4, layer.slots, layer.room) for _ in range(2)]
    for tables, (lines, _) in zip(both, (mine, theirs), strict=True):
        tables.write(lines, 20)
    for tables, (lines, asks) in zip(both, (mine, theirs), strict=True):
        close(added(layer, x, lines, tables), layer.wanted(x, lines, asks))


def test_routes_are_counted_in_every_packed_layer() -> None:
    packs = {2: SETS[2], 3: SETS[3]}
    layer = Layer(16, (10, 6), packs, torch.float32, seed=13, exact=False)
    lines, asks = step(layer, 50, 8)
    assert (lines.tokens < 0).any() and all(lines.lines[0].top_k > 0)
    tables = AdapterTables(torch.device("cpu"), 50, 8, layer.slots, layer.room)
    x = layer.draw(50, 16)
    for _ in range(2):  # counts start anew with every step
        tables.write(lines, 50, counting=True)
        added(layer, x, lines, tables)
        most = max(gates(parts) for parts in SETS.values())
        counted = tables.counts[:, :most].numpy()
        assert np.array_equal(counted, layer.chosen(x, lines, asks, most)) and counted.any()
    tables.write(lines, 50)
    added(layer, x, lines, tables)
    assert np.array_equal(tables.counts[:, :most].numpy(), counted)


def test_inputs_need_not_be_contiguous() -> None:
    layer = Layer(16, (8, 8), SETS, torch.float32, seed=14)
    lines, asks = step(layer, 9, 4)
    x = layer.draw(9, 16)
    tables = AdapterTables(torch.device("cpu"), 9, 4, layer.slots, layer.room)
    tables.write(lines, 9)
    y = layer.base(x).T.contiguous().T
    inputs = torch.from_numpy(x).float().T.contiguous().T
    assert not y.is_contiguous() and not inputs.is_contiguous()
    add_adapters(y, inputs, layer.a, layer.b, layer.sizes, tables)
    close(y, layer.wanted(x, lines, asks))
