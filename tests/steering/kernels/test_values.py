"""The torch form of the value offsets against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.kernels.reference import value_offsets as definition
from steering.kernels.values import value_offsets
from steering.plan import EndValue, Transform

TRANSFORMS: tuple[Transform, ...] = ("identity", "log_sigmoid", "clip")
RULES: tuple[EndValue, ...] = ("prefix", "zero", "model")


@pytest.mark.parametrize("size", [1, 5, 20])
def test_every_row_agrees_with_the_definition(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = 12
    values, prefix = rng.normal(0, 3, (rows, size)), rng.normal(0, 3, rows)
    ending = rng.random((rows, size)) < 0.3
    ending[:3] = True
    counts = rng.integers(1, size + 1, rows)
    valid = np.arange(size) < counts[:, None]
    rules = [RULES[row % 3] for row in range(rows)]
    ways = [TRANSFORMS[row // 3 % 3] for row in range(rows)]
    centred = [row % 2 == 0 for row in range(rows)]
    found = value_offsets(
        torch.tensor(np.where(valid, values, np.nan), dtype=torch.float32),
        torch.tensor(prefix, dtype=torch.float32),
        torch.tensor(valid),
        torch.tensor(ending),
        torch.tensor([rule == "prefix" for rule in rules]),
        torch.tensor([rule == "zero" for rule in rules]),
        torch.tensor([TRANSFORMS.index(way) for way in ways]),
        torch.tensor(centred),
    )
    for row, rule in enumerate(rules):
        k = counts[row]
        own = values[row, :k], prefix[row], ending[row, :k]
        want = definition(*own, rule, ways[row], centred[row])
        assert found[row, :k].numpy() == pytest.approx(want, abs=1e-5)
        assert not found[row, k:].any()


def test_the_rules_for_ends() -> None:
    values, ending = np.array([1.0, 2.0, 9.0]), np.array([False, False, True])
    assert definition(values, 3.0, ending, "model").tolist() == [-3.0, -2.0, 5.0]
    assert definition(values, 3.0, ending, "prefix").tolist() == [-1.0, 0.0, 1.0]
    assert definition(values, 3.0, ending, "zero").tolist() == [-0.5, 0.5, 0.0]
