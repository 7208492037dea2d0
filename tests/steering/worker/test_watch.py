"""The watch for scores that are no numbers: which row, which stream, which request."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steering.worker.watch import Watch, named

NAMES = ("base", "chat", "plain", "critic")
CPU = torch.device("cpu")


def rows(*bad: tuple[int, float], count: int = 4) -> torch.Tensor:
    """[count, 9] finite scores, but one bad number in some rows."""
    found = torch.randn(count, 9, generator=torch.Generator().manual_seed(1))
    for row, number in bad:
        found[row, 5] = number
    return found


def test_flags_follow_rows_to_their_requests() -> None:
    watch = Watch(NAMES)
    watch.begin(4, CPU)
    watch.scores(0, rows((2, math.inf)))
    watch.scores(1, rows((0, math.nan), count=2), torch.tensor([1, 3]))
    watch.only(torch.tensor([2, 3]))
    watch.scores(2, rows((1, math.nan), count=2))
    watch.numbers(3, torch.tensor([1.0]), torch.tensor([0]))
    # Speculation: rows 1 to 3 are one request's.
    watch.end(torch.tensor([1.0, 3.0, 3.0, 3.0]))
    assert watch.take() == {2: 0b0111}
    assert watch.take() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_that_a_model_rules_out_are_no_fault(dtype: torch.dtype) -> None:
    watch = Watch(NAMES)
    watch.base(rows((1, -math.inf)).to(dtype))
    assert watch.take() == {}
    watch.base(torch.full((2, 9), -math.inf, dtype=dtype))
    assert watch.take() == {0: 1, 1: 1}


def test_a_step_of_the_base_alone_counts_its_first_rows() -> None:
    watch = Watch(NAMES)
    assert watch.base(None) is None
    watch.base(rows((3, math.nan)))
    watch.base(rows((0, math.nan)))  # of a prompt
    assert watch.take() == {3: 1}


def test_a_new_step_forgets() -> None:
    watch = Watch(NAMES)
    watch.base(rows((3, math.nan)))
    watch.told("critic", math.nan, 0)
    watch.forget()
    assert watch.take() == {}


def test_values_and_told_numbers_are_of_requests() -> None:
    watch = Watch(NAMES)
    watch.values(2, torch.tensor([1.0, math.nan]), np.array([0, 4]))
    watch.told("critic", math.inf, 4)
    watch.told("critic", 1.0, 1)
    assert watch.take() == {4: 0b1100}


def test_suspects_are_asked_only_for_rows_at_fault() -> None:
    watch, asked = Watch(NAMES), []

    def suspects(row: int) -> int:
        asked.append(row)
        return 0b100 if row == 1 else 0

    watch.begin(3, CPU)
    watch.scores(0, rows((1, math.nan), (2, math.nan), count=3))
    watch.scores(2, rows((1, math.nan), (2, math.nan), count=3))
    watch.end(torch.arange(3.0) + 1, suspects)
    assert watch.take() == {1: 0b100, 2: 0b101}
    assert asked == [1, 2]


def test_names() -> None:
    assert named(0b1010, NAMES) == ["chat", "critic"]
    assert named(0b11, ("x", "x")) == ["x"]
