"""The interpreter as a backend: what vLLM's kernels need of it, and that vLLM takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.emulated import triton_cpu


@triton.jit
def sums(x: Any, out: Any, n: Any, SIZE: tl.constexpr) -> None:
    """Adds up n values in pieces; writes the sum into the cells whose flag is not set."""
    total = tl.zeros((SIZE,), tl.float32)
    for start in tl.range(0, n, SIZE):
        at = start.to(tl.int64) + tl.arange(0, SIZE)
        total += tl.load(x + at, mask=at < n, other=0.0)
    cells = tl.arange(0, SIZE)
    marked = cells == 1
    tl.store(out + cells, tl.sum(total), mask=~marked)


def test_indices_can_be_cast_and_flags_negated() -> None:
    x, out = torch.arange(10.0), torch.zeros(4)
    sums[(1,)](x, out, 10, SIZE=4)
    assert out.tolist() == [45.0, 0.0, 45.0, 45.0]


def test_arguments_are_not_copied() -> None:
    """A kernel sees the tensor's own memory: its place in it, and only as much as it writes."""
    memory = torch.arange(12.0)
    sums[(1,)](memory[2:6], memory[8:], 4, SIZE=4)
    assert memory[:8].tolist() == list(range(8))
    assert memory[8:].tolist() == [14.0, 9.0, 14.0, 14.0]


def test_vllm_takes_it() -> None:
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON


def test_it_cannot_be_installed_too_late() -> None:
    with pytest.raises(RuntimeError, match=r"triton.*imported before the emulation"):
        triton_cpu.install()
