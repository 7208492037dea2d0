"""The control columns carry float32 exactly, in any dtype, and random bits do no harm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.worker.plan.layout import EXTRA, Layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coefficients_survive_bit_for_bit(dtype: torch.dtype) -> None:
    layout = Layout((7, 3, 5), dtype)
    values = np.random.default_rng(0).normal(size=(4, 3 + EXTRA)).astype(np.float32)
    extra: list[list[float]] = [
        [0.0, 1, 0.25, 0, 0, 0],
        [1, 0, 1e-7, 7, 3, 3],
        [3, 2, 1, 0.1, 45, 2],
        [0, 0, 0, 0, 0, 9],
    ]
    values[:, 3:] = np.array([[*own, row % 3, row, 0.3, 7 * row] for row, own in enumerate(extra)])
    out = torch.full((6, layout.width), float("nan"), dtype=dtype)
    out[:, sum(layout.sizes) :] = 0
    layout.write_control(out, torch.from_numpy(values))
    control = layout.read_control(out)
    assert torch.equal(layout.read_coef(out), control.coef)
    assert torch.equal(control.coef[:4], torch.from_numpy(values[:, :3]))
    found = torch.stack([*control[1:11]], 1)
    assert torch.equal(found[:4], torch.from_numpy(values[:, 3:]))
    assert not control.coef[4:].any(), "rows without a request carry nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_bits_are_read_as_something_harmless(dtype: torch.dtype) -> None:
    layout = Layout((2, 2), dtype)
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (500, layout.width), dtype=integer)
    control = layout.read_control(bits.view(dtype))
    assert all(part.isfinite().all() for part in control)
    assert ((control.stream >= 0) & (control.stream < 2)).all()


def test_columns_tile_the_row() -> None:
    layout = Layout((4, 6), torch.bfloat16)
    assert layout.columns(0) == slice(0, 4)
    assert layout.columns(1) == slice(4, 10)
    assert layout.width == 10 + 2 * (2 + EXTRA)
