"""Top-nσ: in float32 on any device as its definition in float64, and as vLLM's samplers call it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steering.kernels.reference import SET_BACK
from steering.kernels.truncation import keep, kept_reference
from steering.wire import TOP_N_SIGMA
from steering.worker.runners.truncation import V1Truncation, V2Truncation

ROWS, SIZE = 24, 300


def rows(seed: int) -> torch.Tensor:
    """Scores of all kinds: with offsets, ids that are ruled out, set back twice, or banned."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(ROWS, SIZE, generator=rng) * torch.linspace(0.2, 9, ROWS)[:, None]
    z += torch.linspace(-500, 500, ROWS)[:, None]
    some = torch.rand(ROWS, SIZE, generator=rng)
    kind = torch.arange(ROWS)[:, None] % 4
    z = torch.where((kind == 1) & (some < 0.5), -torch.inf, z)
    z = torch.where((kind == 2) & (some < 0.9), z - SET_BACK - 120, z)
    z = torch.where((kind == 2) & (some < 0.1), z - 2 * SET_BACK, z)
    z = torch.where((kind == 3) & (some < 0.3), z - 1e6, z)
    z[4], z[8], z[12] = -torch.inf, 3.0, -torch.inf
    z[4, 7] = 1.0
    z[12, [5, 9]] = torch.tensor([2.0, 2.0 + 300])
    return z


@pytest.mark.parametrize("n", [0.3, 1.0, 2.5, 100.0])
def test_as_its_definition(n: float) -> None:
    for seed in range(3):
        z = rows(seed)
        found = keep(z, torch.full((ROWS,), n))
        for row, want in zip(found, z, strict=True):
            kept = kept_reference(want.double().numpy(), n)
            assert torch.isfinite(row).numpy().tolist() == kept.tolist()
            assert kept[int(want.argmax())]
            assert torch.equal(row[torch.isfinite(row)], want[torch.from_numpy(kept)])


def test_by_hand() -> None:
    """σ of 0, 1, 2, 9 with V − 1 is √(50/3) = 4.08: one below the largest, ties are in."""
    scores = np.array([0.0, 9.0, 1.0, 2.0])
    sigma = np.sqrt(50 / 3)
    assert kept_reference(scores, 1.0).tolist() == [False, True, False, False]
    assert kept_reference(scores, 7 / sigma * (1 + 1e-12)).tolist() == [False, True, False, True]
    assert kept_reference(np.array([5.0, 5.0, 0.0]), 0.1).tolist() == [True, True, False]
    far = np.array([0.0, 9.0, 1.0, 2.0, -SET_BACK, -np.inf])
    assert kept_reference(far, 1.0).tolist() == [False, True, False, False, False, False]
    assert kept_reference(far, 100.0).tolist() == [True, True, True, True, False, False]


def test_the_temperature_does_not_matter() -> None:
    z = rows(5)[[0, 1, 5]]
    for t in (0.3, 4.0):
        n = torch.ones(3)
        assert torch.equal(keep(z, n).isfinite(), keep(z / t, n).isfinite())


def test_rows_that_do_not_ask_stay_as_they_are() -> None:
    z = rows(6)
    n = torch.where(torch.arange(ROWS) % 2 == 0, 1.0, 0.0)
    found = keep(z, n)
    assert torch.equal(found[1::2], z[1::2])
    assert not torch.equal(found[::2], z[::2])


def params(n: float | None) -> Any:
    return SimpleNamespace(extra_args=None if n is None else {TOP_N_SIGMA: n})


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> Any:
    added = [(row, params(n), None, []) for row, n in added]
    moved = [(a, b, SimpleNamespace(name=d)) for a, b, d in moved]
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def masked(z: torch.Tensor, asked: dict[int, float], padded: list[int]) -> torch.Tensor:
    want = z.clone()
    for row, n in asked.items():
        want[row, padded] = -torch.inf
        kept = torch.from_numpy(kept_reference(want[row].double().numpy(), n))
        want[row, ~kept] = -torch.inf
    return want


def test_rows_of_v1_come_go_and_move() -> None:
    padded = torch.tensor([3, 299])
    found, z = V1Truncation(padded), rows(7)[[0, 1, 2, 3, 5]]
    assert torch.equal(found.apply(z.clone()), z)
    for change, asked in (
        (update(added=[(0, 1.0), (1, None), (3, 0.5)]), {0: 1.0, 3: 0.5}),
        (None, {0: 1.0, 3: 0.5}),
        (update(moved=[(3, 1, "UNIDIRECTIONAL")]), {0: 1.0, 1: 0.5}),
        (update(added=[(2, 2.0)], moved=[(2, 0, "SWAP")]), {0: 2.0, 2: 1.0, 1: 0.5}),
        (update(moved=[(4, 0, "UNIDIRECTIONAL")]), {2: 1.0, 1: 0.5}),
        (update(removed=[1], added=[(2, None)]), {}),
    ):
        found.update_state(change)
        assert torch.equal(found.apply(z.clone()), masked(z, asked, padded.tolist())), asked


def test_slots_of_v2_and_rows_of_drafts() -> None:
    found, z = V2Truncation(None, 6), rows(8)[[0, 1, 2, 3, 5]]
    assert [found.add_request(slot, params(n)) for slot, n in ((4, 1.0), (2, None), (0, 0.5))] == [
        True, False, True,
    ]  # fmt: skip
    slots = np.array([2, 4, 0])
    step = SimpleNamespace(idx_mapping_np=slots, expanded_idx_mapping=torch.tensor([2, 4, 4, 0, 0]))
    want = masked(z, {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.5}, [])
    assert torch.equal(found.apply(z.clone(), step), want)
    for slot in (4, 0):
        found.add_request(slot, params(None))
    assert torch.equal(found.apply(z.clone(), step), z)
