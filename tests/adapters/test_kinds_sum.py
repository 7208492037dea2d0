"""Constants and diagonals beside products, in torch and in C++, against the definition.

The Triton kernels are held to the same in `interpreted/test_triton_sum.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from adapters.kernels import native, operation
from adapters.kernels.gated import Bundle, Group, InPlace, add_adapters, bundled
from adapters.kernels.lines import Lines
from adapters.kernels.reference import Float, Term, adapter_sum
from tests.adapters.mixed import KINDS, Ask, Layer, Part, Set, groups, line, over_ranks

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
"""Of the largest value; the gates are float32 in every dtype."""

"""A's rows of constants and diagonals are NaN: no kernel may multiply them."""

SIZES = [(1, (1,)), (7, (5, 3, 3)), (64, (64, 32, 32)), (129, (257,)), (63, (31, 33))]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    operation.build()


def step(layer: Layer, tokens: int) -> tuple[Lines, list[list[Ask]]]:
    """Requests of all sets, whose tokens lie in any order; some have no adapter."""
    random = layer.random
    slots = random.choice(list(layer.sets), 9)
    asks = [
        [
            Ask(
                float(random.choice([0.0, 1.0, 0.7, -1.3])),
                int(random.integers(1, len(part.ranks) + 1)) if part.routed else 0,
                float(random.choice([0.5, 1.0, 15.0])),
            )
            for part in layer.sets[slot]
        ]
        for slot in slots
    ]
    own = random.integers(-1, 9, tokens)
    made = tuple(line(layer.sets[slot], ask) for slot, ask in zip(slots, asks, strict=True))
    return Lines(made, slots.astype(np.int32), own.astype(np.int32)), asks


def torch_sum(layer: Layer, y: torch.Tensor, x: torch.Tensor, found: list[Group]) -> None:
    """As the worker calls it without a compiler."""
    add_adapters(y, x, layer.a, layer.b, layer.sizes, bundled(found))


def native_sum(layer: Layer, y: torch.Tensor, x: torch.Tensor, found: list[Group]) -> None:
    """Every group row by row."""
    if found:
        with operation.adding(operation.Added(native.rows(found, y.shape[0]), ())):
            torch.ops.coxswain.adapter_sum(y, x, layer.a, layer.b, list(layer.sizes))


def close(y: torch.Tensor, want: Float) -> None:
    """Within the dtype's tolerance, as a share of the largest value."""
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    assert np.abs(y.double().numpy() - want).max(initial=0) <= TOLERANCE[y.dtype] * scale


@pytest.mark.parametrize(("into", "sizes"), SIZES)
@pytest.mark.parametrize("tokens", [1, 13, 120])
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (torch_sum, torch.float64),
        (torch_sum, torch.float32),
        (native_sum, torch.float32),
        (native_sum, torch.bfloat16),
    ],
)
def test_all_kinds_in_one_batch(
    way: object, tokens: int, into: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Of equal scores torch takes any: it gets gates without ties, and C++ those with many.
    layer = Layer(
        into, sizes, KINDS, dtype, seed=tokens + into, across=into % 2 == 1, exact=way is native_sum
    )
    lines, asks = step(layer, tokens)
    x = layer.draw(tokens, into)
    y = layer.base(x)
    base = y.clone()
    way(layer, y, torch.from_numpy(x).to(dtype), groups(KINDS, lines, asks))  # type: ignore[operator]
    # The definition starts from what the layer gave: its rounding is not the sum's.
    want = layer.wanted(x, lines, asks)
    close(y, want)
    bare = np.flatnonzero(lines.tokens < 0)
    assert torch.equal(y[bare], base[bare])


@pytest.mark.parametrize("cut", [[0, 20, 64], [0, 7, 8, 64]])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("in_rows", "dtype"),
    [(False, torch.float64), (False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
)
def test_ranks_that_see_parts_of_the_input(
    in_rows: bool, tokens: int, cut: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their outputs add up to the layer's: gates choose by the scores of the whole input."""
    layer = Layer(64, (64, 131), KINDS, dtype, seed=tokens, exact=in_rows)
    lines, asks = step(layer, tokens)
    lines.tokens[0] = np.flatnonzero(lines.slots == 3)[0]
    x, found = layer.draw(tokens, 64), groups(KINDS, lines, asks)
    parts = [layer.part(start, stop) for start, stop in itertools.pairwise(cut)]

    def run(rank: int, sum_scores: InPlace) -> torch.Tensor:
        part, own = parts[rank], x[:, cut[rank] : cut[rank + 1]]
        y, inputs = part.base(own), torch.from_numpy(own).to(dtype)
        if not in_rows:
            add_adapters(y, inputs, part.a, part.b, part.sizes, bundled(found), sum_scores)
            return y

        def all_reduce(scores: torch.Tensor) -> torch.Tensor:
            sum_scores(scores)
            return scores

        monkeypatch.setattr(operation, "_all_reduce", all_reduce)
        with operation.adding(operation.Added(native.rows(found, tokens), ())):
            sizes = list(part.sizes)
            torch.ops.coxswain.adapter_sum(y, inputs, part.a, part.b, sizes, split=True)
        return y

    y = over_ranks(len(parts), run)
    want = layer.wanted(x, lines, asks)
    scale = max(1.0, float(np.abs(want).max()))
    assert np.abs(y.numpy() - want).max() <= 2 * TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    """Row by row a plain request's bits are the same beside diagonals, and the other way round."""
    layer = Layer(64, (512, 131), KINDS, dtype, seed=3)
    lines, asks = step(layer, 60)
    x = layer.draw(60, 64)
    inputs, found = torch.from_numpy(x).to(dtype), groups(KINDS, lines, asks)
    assert len(found) == 4
    together = layer.base(x)
    native_sum(layer, together, inputs, found)
    for group in found:
        alone = layer.base(x)
        native_sum(layer, alone, inputs, [group])
        assert group.tokens is not None
        assert torch.equal(alone[group.tokens], together[group.tokens])


@pytest.mark.parametrize("way", [torch_sum, native_sum])
@pytest.mark.parametrize("tokens", [1, 40])
def test_small_diagonals_survive_bfloat16(way: object, tokens: int) -> None:
    """1 + 2⁻⁹ is 1 in bfloat16; the two diagonals together are 2⁻⁸, half of its step above 1."""
    sets: dict[int, Set] = {0: (Part((0,), diagonals=(True,)), Part((0,), diagonals=(True,)))}
    layer = Layer(8, (160,), sets, torch.bfloat16, slots=1, room=2)
    layer.b[0][:] = 2**-9
    x = torch.zeros(tokens, 8).bfloat16()
    y = torch.full((tokens, 160), 1.0).bfloat16()
    made = (line(sets[0], [Ask(1.0), Ask(1.0)]),)
    lines = Lines(made, np.zeros(1, np.int32), np.zeros(tokens, np.int32))
    way(layer, y, x, groups(sets, lines, [[Ask(1.0), Ask(1.0)]]))  # type: ignore[operator]
    assert (y == 1 + 2**-7 - 2**-8).logical_or(y == 1 + 2**-7).all()


def test_only_products_are_bundled() -> None:
    plain = [Group(i, torch.tensor([i]), 4, 4, None) for i in range(2)]
    scaled = Group(2, torch.tensor([2]), 5, 5, None, (), 0, 1)
    first, *others = bundled([*plain, scaled])
    assert isinstance(first, Bundle) and others == [scaled]


def test_the_definition() -> None:
    """Written out for one output: t = 2 · 3 + 1 = 7."""
    one = np.ones(1)
    x, weight, bias = np.array([[3.0]]), np.array([[2.0]]), np.array([1.0])
    ia3 = Term(np.zeros((0, 1)), np.zeros((1, 0)), 1.0, 0.5 * one, diagonal=np.array([0.2]))
    lora = Term(np.array([[1.0]]), np.array([[4.0]]), 2.0, -one, constant=np.array([5.0]))
    found = adapter_sum(x, weight, [ia3, lora], bias)
    # Deviations are added: the second does not see what the first did.
    assert found == pytest.approx(np.array([[7 + 0.5 * 0.2 * 7 - (2 * 4 * 3 + 5)]]))
