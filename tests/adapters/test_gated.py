"""The torch kernel against the definition, over sizes that hurt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapters.kernels.gated import SMALL, Bundle, Group, Route, add_adapters, bundled
from adapters.kernels.reference import Float, Term, adapter_sum, routing

SLOTS, ROOM = 3, 40
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Absolute, on sums of about 1 to 10; the gates are float32 in every dtype."""


class Layer:
    """Packed layers with random W, and slots full of numbers that must not be read.

    Args:
        into: columns of x.
        sizes: output columns of each packed layer.
        dtype: of everything but the gates.
        seed: of the weights.
    """

    def __init__(self, into: int, sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.into, self.sizes, self.dtype = into, sizes, dtype
        self.weight = self.draw(sum(sizes), into) / np.sqrt(into)
        # What lies outside a set's own rows and columns may be anything, even NaN.
        self.a = [torch.full((SLOTS, 1, ROOM, into), torch.nan, dtype=dtype) for _ in sizes]
        self.b = [torch.full((SLOTS, 1, n, ROOM), torch.nan, dtype=dtype) for n in sizes]

    def draw(self, *shape: int) -> Float:
        """Normal numbers that the dtype holds exactly."""
        values = torch.from_numpy(self.random.standard_normal(shape)).to(self.dtype)
        found: Float = values.double().numpy()
        return found

    def fill(self, slot: int, columns: int, gates: int) -> list[tuple[Float, Float, Float]]:
        """Per packed layer A, B and W_gate, written into the slot."""
        found = []
        for a_all, b_all, size in zip(self.a, self.b, self.sizes, strict=True):
            a, b, gate = (
                self.draw(columns, self.into),
                self.draw(size, columns),
                self.draw(gates, self.into),
            )
            a_all[slot, 0, : columns + gates] = torch.from_numpy(np.concatenate([a, gate]))
            b_all[slot, 0, :size, :columns] = torch.from_numpy(b)
            found.append((a, b, gate))
        return found


def close(y: torch.Tensor, want: Float) -> None:
    """Within the dtype's tolerance, as a share of the largest value."""
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    assert np.abs(y.double().numpy() - want).max(initial=0) <= TOLERANCE[y.dtype] * scale


SIZES = [(1, (1,)), (7, (5, 3, 3)), (64, (64, 32, 32)), (129, (257,)), (63, (31, 33))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("into", "sizes"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_constant_gates(into: int, sizes: tuple[int, ...], tokens: int, dtype: torch.dtype) -> None:
    layer = Layer(into, sizes, dtype, tokens)
    ranks = (1, 3)
    weights = layer.fill(1, sum(ranks), 0)
    x, gate = layer.draw(tokens, into), layer.draw(tokens, 2)
    used = np.flatnonzero(np.arange(tokens) % 3 != 1)
    base = x @ layer.weight.T
    y = torch.from_numpy(base).to(dtype)
    untouched = y.clone()
    columns = torch.from_numpy(np.repeat(gate[used], ranks, axis=1)).float()
    group = Group(1, torch.from_numpy(used), sum(ranks), sum(ranks), columns)
    add_adapters(y, torch.from_numpy(x).to(dtype), layer.a, layer.b, sizes, [group])
    masked = np.where(np.isin(np.arange(tokens), used)[:, None], gate, 0.0)
    close(y, expected(layer, x, weights, ranks, [masked] * len(sizes)))
    others = np.setdiff1d(np.arange(tokens), used)
    assert torch.equal(y[others], untouched[others])


def expected(
    layer: Layer,
    x: Float,
    weights: list[tuple[Float, Float, Float]],
    ranks: tuple[int, ...],
    gates: list[Float],
) -> Float:
    """By the definition; gates [T, M] per packed layer."""
    found, ends, start = [], np.cumsum(ranks), 0
    for (a, b, _), size, gate in zip(weights, layer.sizes, gates, strict=True):
        terms = [
            Term(a[end - r : end], b[:, end - r : end], 1.0, gate[:, j])
            for j, (r, end) in enumerate(zip(ranks, ends, strict=True))
        ]
        found.append(adapter_sum(x, layer.weight[start : start + size], terms))
        start += size
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("into", "sizes"), SIZES)
@pytest.mark.parametrize("members", [1, 2, 7])
def test_learned_gates_beside_a_constant_one(
    into: int, sizes: tuple[int, ...], members: int, dtype: torch.dtype
) -> None:
    tokens, lora = 23, 2
    layer = Layer(into, sizes, dtype, members)
    own = tuple(1 + j % 3 for j in range(members))
    ranks, columns = (lora, *own), lora + sum(own)
    weights = layer.fill(2, columns, members)
    x = layer.draw(tokens, into)
    constant, weight = layer.draw(tokens), layer.draw(tokens)
    top_k = layer.random.integers(1, members + 1, tokens)
    temperature = layer.random.choice([0.5, 1.0, 15.0], tokens)
    gate = np.ones((tokens, columns), np.float32)
    gate[:, :lora] = constant[:, None]
    route = Route(
        slice(lora, columns),
        slice(columns, columns + members),
        torch.from_numpy(np.repeat(np.arange(members), own)),
        torch.from_numpy(weight).float(),
        torch.from_numpy(top_k),
        int(top_k.max()),
        torch.from_numpy(temperature).float(),
    )
    group = Group(2, None, columns, columns + members, torch.from_numpy(gate), (route,))
    y = torch.from_numpy(x @ layer.weight.T).to(dtype)
    add_adapters(y, torch.from_numpy(x).to(dtype), layer.a, layer.b, sizes, [group])
    gates = []
    for _, _, w_gate in weights:
        scores = x @ w_gate.T
        rows = [
            routing(scores[t : t + 1], int(top_k[t]), float(temperature[t])) * weight[t]
            for t in range(tokens)
        ]
        gates.append(np.concatenate([constant[:, None], np.concatenate(rows)], axis=1))
    close(y, expected(layer, x, weights, ranks, gates))


def test_groups_do_not_mix() -> None:
    layer = Layer(16, (24,), torch.float32, 1)
    slots = {slot: layer.fill(slot, 4 + slot, 0) for slot in range(SLOTS)}
    x = layer.draw(30, 16)
    order = layer.random.permutation(30)
    groups = [
        Group(slot, torch.from_numpy(order[slot * 8 : slot * 8 + 8]), 4 + slot, 4 + slot, None)
        for slot in range(SLOTS)
    ]
    together = torch.from_numpy(x @ layer.weight.T).float()
    base = together.clone()
    inputs = torch.from_numpy(x).float()
    add_adapters(together, inputs, layer.a, layer.b, (24,), groups)
    for slot, group in enumerate(groups):
        alone = base.clone()
        add_adapters(alone, inputs, layer.a, layer.b, (24,), [group])
        assert torch.equal(together[group.tokens], alone[group.tokens])
        want = expected(layer, x, slots[slot], (4 + slot,), [np.ones((30, 1))])
        close(alone[group.tokens], want[order[slot * 8 : slot * 8 + 8]])
    assert torch.equal(together[order[24:]], base[order[24:]])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("slots", [(0, 1, 2), (0, 2), (2, 1)])
def test_small_groups_together_are_the_same(slots: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Layer(33, (16, 7), dtype, 4)
    for side in (*layer.a, *layer.b):
        side.zero_()  # as vLLM does before it fills a slot
    ranks = {slot: (1 + slot, 2) for slot in slots}
    weights = {slot: layer.fill(slot, sum(ranks[slot]), 0) for slot in slots}
    x = layer.draw(20, 33)
    order = layer.random.permutation(20)
    base = torch.from_numpy(x @ layer.weight.T).to(dtype)
    groups, want, start = [], base.double().numpy().copy(), 0
    for i, slot in enumerate(slots):
        own = order[start : start + 1 + 2 * i]
        start += own.size
        gate = layer.draw(20, 2) if i else np.ones((20, 2))
        columns = torch.from_numpy(np.repeat(gate[own], ranks[slot], axis=1)).float()
        width = sum(ranks[slot])
        groups.append(Group(slot, torch.from_numpy(own), width, width, columns if i else None))
        want[own] = expected(layer, x, weights[slot], ranks[slot], [gate, gate])[own]
    together = bundled(groups)
    assert len(together) == 1 and isinstance(together[0], Bundle)
    assert isinstance(together[0].slots, slice) == (slots != (0, 2))
    y = base.clone()
    add_adapters(y, torch.from_numpy(x).to(dtype), layer.a, layer.b, (16, 7), together)
    close(y, want)
    assert torch.equal(y[order[start:]], base[order[start:]])


def test_what_is_bundled() -> None:
    few, many = torch.arange(2), torch.arange(2, 3 + SMALL)
    small = [Group(slot, few + 20 * slot, 4, 4, None) for slot in range(3)]
    whole, large = Group(1, None, 4, 4, None), Group(4, many, 4, 4, None)
    ones = torch.ones(2)
    route = Route(slice(0, 4), slice(4, 5), few, ones, few, 1, ones)
    routed = Group(5, few + 70, 4, 5, None, (route,))
    assert bundled([whole]) == (whole,)
    assert bundled([small[0], large]) == (small[0], large)
    assert bundled([small[2], large, small[0], routed])[1:] == (large, routed)


def test_inputs_need_not_be_contiguous() -> None:
    layer = Layer(16, (8, 8), torch.float32, 2)
    weights = layer.fill(0, 4, 0)
    x = layer.draw(9, 16)
    base = x @ layer.weight.T
    inputs = torch.from_numpy(x).float().T.contiguous().T
    y = torch.from_numpy(base).float().T.contiguous().T
    assert not inputs.is_contiguous() and not y.is_contiguous()
    add_adapters(y, inputs, layer.a, layer.b, (8, 8), [Group(0, None, 4, 4, None)])
    close(y, expected(layer, x, weights, (4,), [np.ones((9, 1))] * 2))


def test_routing_is_the_papers_code_path() -> None:
    """topk, then softmax over the chosen; over all and renormalised only at T = 1."""
    scores = np.random.default_rng(3).standard_normal((50, 6))
    for top_k in (1, 2, 6):
        everything = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        kept = everything * (np.argsort(np.argsort(-scores)) < top_k)
        renormalised = kept / kept.sum(-1, keepdims=True)
        assert routing(scores, top_k, 1.0) == pytest.approx(renormalised)
    assert (routing(scores, 1, 7.0).max(-1) == 1).all()
    assert routing(scores, 6, 1e9) == pytest.approx(np.full((50, 6), 1 / 6))
