"""The adapter sum in a graph that is recorded once: right for whatever the tables say later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.kernels.lines import Lines
from adapters.kernels.triton_sum import CLASSES, AdapterTables, Blocks, add_adapters
from tests.adapters.mixed import KINDS, Layer, gates
from tests.adapters.steps import SETS, step
from tests.emulated.graphs import CUDAGraph, emulated, graph

CPU = torch.device("cpu")
BOTH = {0: SETS[1], 1: SETS[3], 2: KINDS[2], 3: KINDS[3]}
"""Every kind of set: the graph does not know which a step will have."""


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    with emulated():
        yield


class Recorded:
    """A layer's sum over T padded rows, recorded while nobody used an adapter."""

    def __init__(self, layer: Layer, rows: int) -> None:
        self.tables = AdapterTables(CPU, rows, 20, layer.slots, layer.room)
        self.x = torch.full((rows, layer.into), torch.nan, dtype=layer.dtype)
        self.y = torch.full((rows, sum(layer.sizes)), torch.nan, dtype=layer.dtype)
        self._graph, a, b = CUDAGraph(), layer.a, layer.b
        with graph(self._graph):
            add_adapters(self.y, self.x, a, b, layer.sizes, self.tables)

    def replay(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The sum for some rows; the others are poisoned, and stay as they are."""
        rows = len(x)
        self.x.fill_(torch.nan)
        self.y.fill_(torch.nan)
        self.x[:rows], self.y[:rows] = x, y
        self._graph.replay()
        assert self.y[rows:].isnan().all()
        return self.y[:rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_recording_over_many_tables_is_equal_to_the_bit(dtype: torch.dtype) -> None:
    layer = Layer(40, (24, 9), BOTH, dtype, seed=21)
    recorded, changed = Recorded(layer, 4), 0
    for seed in range(14):
        rows = 1 + seed % 4
        # Every fifth step has no adapter, and every seventh no request that has one.
        lines, _ = step(layer, rows, 1 + seed % 6, bare=1.0 if seed % 5 == 4 else 0.3)
        lines = Lines.none() if seed % 7 == 6 else lines
        fresh = AdapterTables(CPU, 4, 20, layer.slots, layer.room)
        for tables, total in ((recorded.tables, 4), (fresh, rows)):
            tables.write(lines, total)
        x = layer.draw(rows, 40)
        inputs, base = torch.from_numpy(x).to(dtype), layer.base(x)
        want = base.clone()
        add_adapters(want, inputs, layer.a, layer.b, layer.sizes, fresh)
        got = recorded.replay(inputs, base)
        assert torch.equal(got, want)
        changed += int(not torch.equal(got, base))
        bare = np.setdiff1d(np.arange(rows), np.flatnonzero(lines.tokens >= 0))
        assert torch.equal(got[bare], base[bare])
    assert changed >= 8


def test_empty_tables_add_nothing_to_the_bit() -> None:
    layer = Layer(16, (10, 6), SETS, torch.float32, seed=22)
    recorded = Recorded(layer, 4)
    x = torch.randn(4, 16)
    # −0.0 + 0.0 would be 0.0: not even that happens.
    y = torch.randn(4, 16).masked_fill(torch.rand(4, 16) < 0.3, -0.0)
    for _ in range(2):
        got = recorded.replay(x, y)
        assert torch.equal(got.view(torch.int32), y.view(torch.int32))
        recorded.tables.write(step(layer, 4, 3)[0], 4)
        recorded.replay(x, y)
        recorded.tables.write(Lines.none(), 4)


def test_a_replay_counts_routes_only_if_the_tables_say_so() -> None:
    packs = {2: SETS[2], 3: SETS[3]}
    layer = Layer(16, (10, 6), packs, torch.float32, seed=13, exact=False)
    recorded, most = Recorded(layer, 6), max(gates(parts) for parts in packs.values())
    for seed in range(4):
        lines, asks = step(layer, 6, 5, bare=0.0)
        x = layer.draw(6, 16)
        before = recorded.tables.counts.clone()
        recorded.tables.write(lines, 6, counting=seed % 2 == 0)
        recorded.replay(torch.from_numpy(x).float(), layer.base(x))
        if seed % 2:
            assert torch.equal(recorded.tables.counts, before)
            continue
        counted = recorded.tables.counts[: len(lines.lines), :most].numpy()
        want = layer.chosen(x, lines, asks, most)
        assert np.array_equal(counted, want[: len(lines.lines)])
        assert counted.any()


def test_twins_share_layers_and_have_tables_of_their_own() -> None:
    """Two graphs of one layer, replayed by turns: neither sees the other's tables."""
    layer = Layer(16, (10,), SETS, torch.float32, seed=23)
    both = [Recorded(layer, 4) for _ in range(2)]
    for _ in range(3):
        x = layer.draw(4, 16)
        inputs, base = torch.from_numpy(x).float(), layer.base(x)
        found = [step(layer, 4, 3, bare=0.0)[0] for _ in both]
        for recorded, lines in zip(both, found, strict=True):
            recorded.tables.write(lines, 4)
        for recorded, lines in zip(both, found, strict=True):
            fresh, want = AdapterTables(CPU, 4, 20, layer.slots, layer.room), base.clone()
            fresh.write(lines, 4)
            add_adapters(want, inputs, layer.a, layer.b, layer.sizes, fresh)
            assert torch.equal(recorded.replay(inputs, base), want)


def test_the_classes_are_all_ways_that_kernels_are_compiled() -> None:
    """Splits are a number that kernels are given; whatever else differs compiles another one."""
    for ranks in (16, 64, 256):
        kinds: dict[Blocks, int] = {}
        for total in range(1, 3000):
            cut = Blocks.of(total, ranks)
            kinds.setdefault(replace(cut, splits=0), total)
        assert tuple(kinds.values()) == CLASSES
