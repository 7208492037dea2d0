"""The benchmark's work, small: its two paths agree, and it would notice if they did not."""

from __future__ import annotations

import pytest
import torch

from load_tests.adapter_kernel_bench import Case, Work

HIDDEN, KV, INNER = 32, 16, 48


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(HIDDEN, KV, INNER, 3, 5, 1), torch.bfloat16),
        (Case(HIDDEN, KV, INNER, 2, 9, 4), torch.float32),
        (Case(HIDDEN, KV, INNER, 2, 4, 1, pack=True), torch.bfloat16),
    ],
    ids=str,
)
def test_both_paths_agree(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    work = Work(case, torch.device("cpu"), dtype, by_columns=case.pack)
    work.check()
    work.tables.tokens[:2] = 0  # another token's row now stays as it is
    with pytest.raises(AssertionError, match="relative error"):
        work.check()
