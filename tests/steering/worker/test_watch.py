"""The watch for scores that are no numbers: which row, which stream, which request."""

from __future__ import annotations

import math

import pytest
import torch

from steering.worker.readout.watch import NOTHING_LEFT, Watch, named

NAMES = ("base", "chat", "plain", "critic")


def rows(*bad: tuple[int, float], count: int = 4) -> torch.Tensor:
    """[count, 9] finite scores, but one bad number in some rows."""
    found = torch.randn(count, 9, generator=torch.Generator().manual_seed(1))
    for row, number in bad:
        found[row, 5] = number
    return found


def step(requests: int = 4, count: int | None = None) -> Watch:
    """A watch inside the rows of a step."""
    watch = Watch(NAMES)
    watch.begin_step(requests)
    watch.begin_rows(requests if count is None else count)
    return watch


def test_flags_follow_rows_to_their_requests() -> None:
    watch = step(2, 4)
    watch.scores(0, rows((2, math.inf)))
    watch.scores(1, rows((0, math.nan), count=2), torch.tensor([1, 3]))
    watch.scores(2, rows((1, math.nan), (3, math.nan)), None, torch.tensor([1, 0, 1, 1]) > 0)
    watch.numbers([3], torch.tensor([1.0]), torch.tensor([0]))
    # Speculation: rows 1 to 3 are the second request's.
    watch.end_rows(torch.tensor([[0, 0, 0], [1, 2, 3]]))
    assert watch.take() == {1: 0b0111}
    assert watch.at_fault == {1}
    assert watch.take() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_that_a_model_rules_out_are_no_fault(dtype: torch.dtype) -> None:
    watch = step()
    watch.scores(0, rows((1, -math.inf)).to(dtype))
    watch.end_rows(None)
    assert watch.take() == {}
    watch.begin_rows(4)
    watch.scores(0, torch.full((2, 9), -math.inf, dtype=dtype), torch.tensor([0, 1]))
    watch.end_rows(None)
    assert watch.take() == {0: 1, 1: 1}


def test_rows_of_prompts_are_not_looked_at() -> None:
    watch = step()
    watch.scores(0, rows((3, math.nan)))
    watch.end_rows(None)
    watch.scores(0, rows((0, math.nan)))
    assert watch.take() == {3: 1}


def test_a_new_step_forgets() -> None:
    watch = step()
    watch.scores(0, rows((3, math.nan)))
    watch.end_rows(None)
    watch.begin_step(4)
    assert watch.take() == {}


def test_values_and_constraints_are_of_requests() -> None:
    watch = Watch(NAMES)
    watch.begin_step(5)
    watch.requests(2, torch.tensor([1.0, math.nan]), torch.tensor([0, 4]))
    watch.left(torch.arange(5) == 1)
    assert watch.flags is not None
    assert watch.flags.tolist() == [0, NOTHING_LEFT, 0, 0, 0b100]
    watch.send()
    assert watch.take() == {1: NOTHING_LEFT, 4: 0b100}
    assert watch.at_fault == {4}


@pytest.mark.parametrize("drafts", [0, 1])
def test_streams_are_suspected_only_in_rows_at_fault(drafts: int) -> None:
    watch = step(3, 3 + drafts)
    asked = []

    def suspects(of: slice | torch.Tensor) -> int:
        asked.append(torch.arange(3 + drafts)[of].tolist())
        return 0b100 if 1 in asked[-1] else 0

    watch.suspects = suspects
    watch.numbers([0, 2], rows((1, math.nan), (2, math.nan), count=3 + drafts).amax(-1))
    watch.end_rows(torch.tensor([[0, 0], [1, 2], [3, 3]]) if drafts else None)
    assert watch.take() == ({1: 0b100} if drafts else {1: 0b100, 2: 0b101})
    assert asked == ([[1, 2]] if drafts else [[1], [2]])


def test_names() -> None:
    assert named(0b1010, NAMES) == ["chat", "critic"]
    assert named(0b11, ("x", "x")) == ["x"]
