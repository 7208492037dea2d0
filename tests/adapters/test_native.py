"""The C++ kernel against the torch kernel of the same sum, on mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.kernels import native, operation
from adapters.kernels.gated import Group, Route, Tally, add_adapters

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest output; bfloat16 is rounded between the two products in torch only."""

SIZES = [(1, (1,)), (33, (16, 7, 5)), (128, (512, 131)), (96, (1030,))]
SLOTS, COLUMNS, MEMBERS = 4, 14, 4


@pytest.fixture(scope="module", autouse=True)
def built() -> Iterator[None]:
    """With threads, which other tests do without."""
    operation.build()
    if not native.build():
        pytest.skip("no C++ compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Layer:
    """Random weights of packed layers; slots hold COLUMNS columns and MEMBERS gate rows."""

    def __init__(self, into: int, sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.sizes, self.dtype = sizes, dtype
        rows = COLUMNS + MEMBERS
        self.a = [self.draw(SLOTS, 1, rows, into) * into**-0.5 for _ in sizes]
        self.b = [self.draw(SLOTS, 1, size, rows) for size in sizes]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def native(
        self, y: torch.Tensor, x: torch.Tensor, groups: list[Group], b: list[torch.Tensor]
    ) -> torch.Tensor:
        """What becomes of y when `groups` are added row by row."""
        y = y.clone()
        rows = native.rows(groups, y.shape[0])
        with operation.adding(operation.Added(rows, ())):
            torch.ops.coxswain.adapter_sum(y, x, self.a, b, list(self.sizes))
        return y


def mixed_groups(tokens: int, seed: int) -> list[Group]:
    """Plain, weighted and routed groups over most of some tokens; one has two routes."""
    random = np.random.default_rng(seed)
    order = random.permutation(tokens)
    cut = [*sorted(random.integers(0, tokens + 1, 3)), max(1, tokens - tokens // 5)]
    cut = sorted(min(c, cut[-1]) for c in cut)
    parts = [order[i:j] for i, j in zip([0, *cut[:-1]], cut, strict=True)]
    groups = []
    for slot, part in enumerate(parts):
        n = len(part)
        if not n:
            continue
        gate = None if slot == 0 else torch.from_numpy(random.standard_normal((n, COLUMNS))).float()
        if slot > 1:
            assert gate is not None
            gate[:, 4:] = 1.0
        routes = {0: (), 1: (), 2: ((4, 4),), 3: ((4, 1), (9, 3))}[slot]
        made, row = [], COLUMNS
        for start, members in routes:
            made.append(route(random, n, start, row, members))
            row += members
        chosen = torch.from_numpy(np.sort(part))
        groups.append(Group(slot, chosen, COLUMNS, COLUMNS + MEMBERS, gate, tuple(made)))
    return groups


def route(random: np.random.Generator, n: int, start: int, row: int, members: int) -> Route:
    ranks = [1 + j % 2 for j in range(members)]
    top_k = random.integers(1, members + 1, n)
    requests = torch.from_numpy(random.integers(0, 3, n))
    return Route(
        slice(start, start + sum(ranks)),
        slice(row, row + members),
        torch.from_numpy(np.repeat(np.arange(members), ranks)),
        torch.from_numpy(random.standard_normal(n)).float(),
        torch.from_numpy(top_k),
        int(top_k.max()),
        torch.from_numpy(random.choice([0.5, 1.0, 15.0], n)).float(),
        Tally(requests, torch.zeros(3, members, dtype=torch.int64)),
    )


def counted(groups: list[Group]) -> list[torch.Tensor]:
    """The counts of all routes, which are set to 0 for the next kernel."""
    tallies = [r.tally for g in groups for r in g.routes if r.tally is not None]
    found = [tally.counts.clone() for tally in tallies]
    for tally in tallies:
        tally.counts.zero_()
    return found


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("into", "sizes"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 300])
def test_rows_are_the_groups(
    tokens: int, into: int, sizes: tuple[int, ...], dtype: torch.dtype, by_column: bool
) -> None:
    layer = Layer(into, sizes, dtype, seed=tokens)
    x, y = layer.draw(tokens, into), layer.draw(tokens, sum(sizes))
    groups = mixed_groups(tokens, seed=3 * tokens + into)
    assert groups
    want = y.double()
    add_adapters(
        want,
        x.double(),
        [a.double() for a in layer.a],
        [b.double() for b in layer.b],
        sizes,
        groups,
    )
    routed = counted(groups)
    b = [b.mT.contiguous().mT for b in layer.b] if by_column else layer.b
    got = layer.native(y, x, groups, b)
    assert not torch.equal(got, y)
    scale = float(want.abs().max())
    assert float((got.double() - want).abs().max()) <= TOLERANCE[dtype] * scale
    for mine, theirs in zip(counted(groups), routed, strict=True):
        assert torch.equal(mine, theirs)
    used = torch.cat([g.tokens for g in groups if g.tokens is not None])
    others = np.setdiff1d(np.arange(tokens), used)
    assert torch.equal(got[others], y[others])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer = Layer(128, (512, 131), torch.bfloat16, seed=5)
    x, y = layer.draw(60, 128), layer.draw(60, 643)
    groups = mixed_groups(60, seed=8)
    assert len(groups) == 4
    together = layer.native(y, x, groups, layer.b)
    for group in groups:
        assert group.tokens is not None
        alone = layer.native(y, x, [group], layer.b)
        assert torch.equal(alone[group.tokens], together[group.tokens])


def test_columns_with_a_gate_of_zero_are_not_read() -> None:
    """Other sets' leftovers in a slot, NaN at worst, must not reach anyone."""
    layer = Layer(33, (16, 7, 5), torch.float32, seed=6)
    x, y = layer.draw(3, 33), layer.draw(3, 28)
    gate = torch.ones(3, COLUMNS)
    gate[:, 5:] = 0
    group = Group(1, None, COLUMNS, COLUMNS, gate)
    want = layer.native(y, x, [group], layer.b)
    for a, b in zip(layer.a, layer.b, strict=True):
        a[1, 0, 5:] = torch.nan
        b[1, 0, :, 5:] = torch.nan
        a[0], b[2] = torch.nan, torch.inf
    assert torch.equal(layer.native(y, x, [group], layer.b), want)


def test_rounding_is_torchs() -> None:
    """One column, B = 1 and x = 1: y + a, rounded once, also where that is infinite or NaN."""
    values = torch.tensor([0.0, -0.0, 1.00390625, 3e38, -3e38, torch.inf, torch.nan, 1e-40] * 16)
    y = values[torch.randperm(128, generator=torch.Generator().manual_seed(1))].bfloat16()
    a, b = values.bfloat16()[:1] + 3e38, torch.ones(1, 1, 128, 1).bfloat16()
    want = (y.float() + a.float()).bfloat16()
    got = y.clone()[None]
    rows = native.rows([Group(0, None, 1, 1, None)], 1)
    with operation.adding(operation.Added(rows, ())):
        torch.ops.coxswain.adapter_sum(
            got, torch.ones(1, 1).bfloat16(), [a.view(1, 1, 1, 1)], [b.mT.contiguous().mT], [128]
        )
    assert torch.equal(got[0].isnan(), want.isnan())
    assert torch.equal(got[0].nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_rows_and_groups_in_one_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine calls it: some groups go row by row, the large one does not."""
    monkeypatch.setattr(native, "NARROW", COLUMNS - 1)
    layer = Layer(64, (256, 40), dtype, seed=9)
    x, y = layer.draw(400, 64), layer.draw(400, 296)
    groups = mixed_groups(200, seed=11)
    groups.append(Group(1, torch.arange(200, 400), COLUMNS, COLUMNS + MEMBERS, None))
    what = operation.added(groups, 400, dtype)
    if dtype in native.DTYPES:
        assert what.rows is not None and 0 < len(what.groups) < len(groups)
    else:
        assert what.rows is None and len(what.groups) == len(groups)
    want = y.double()
    a, b = ([t.double() for t in side] for side in (layer.a, layer.b))
    add_adapters(want, x.double(), a, b, layer.sizes, groups)
    with operation.adding(what):
        torch.ops.coxswain.adapter_sum(y, x, layer.a, layer.b, list(layer.sizes))
    scale = float(want.abs().max())
    assert float((y.double() - want).abs().max()) <= TOLERANCE[torch.bfloat16] * scale
    after = y.clone()
    torch.ops.coxswain.adapter_sum(y, x, layer.a, layer.b, list(layer.sizes))
    assert torch.equal(y, after)  # outside of `adding` nothing is added


def test_what_goes_row_by_row() -> None:
    few, narrow = Group(0, torch.arange(4), 64, 64, None), Group(1, None, 8, 8, None)
    one = torch.ones(1)
    route = Route(slice(0, 64), slice(64, 65), one, one, one, 1, one)
    routed = Group(2, None, 64, 65, None, (route,))
    for group in (few, narrow, routed):
        assert native.suits(group, 4000)
    assert not native.suits(Group(3, None, 64, 64, None), 4000)


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert not native.build.__wrapped__()
    monkeypatch.setattr(operation, "_native", False)
    assert operation.added([Group(0, None, 8, 8, None)], 1, torch.float32).rows is None


def test_a_build_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("no program")
    monkeypatch.setattr(native, "_SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not native.build.__wrapped__()
    assert not list((tmp_path / "cache" / "coxswain").iterdir())
