"""The loop of every recipe: rates, checkpoints, what it says, and when it gives up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.training.descent import Descent, rate_share
from adapters.training.errors import BadRecipe

RUN: dict[str, Any] = {"settings": {}}


def made(parameters: dict[str, Tensor], rates: list[float], save_every: int = 4) -> Descent:
    """Ten steps over parameters, each with a rate of its own."""
    peaks = [([value], rate) for value, rate in zip(parameters.values(), rates, strict=True)]
    return Descent("toy", parameters, peaks, 10, 0.3, 0.0, save_every)


def bowl(parameters: dict[str, Tensor], most: int = 10) -> Iterator[tuple[float, str]]:
    """Losses of Σ x², at most so many."""
    for _ in range(most):
        loss = torch.stack([value.square().sum() for value in parameters.values()]).sum()
        loss.backward()
        yield float(loss.detach()), f"loss {float(loss.detach()):.3f}"


def two() -> dict[str, Tensor]:
    """Two parameters."""
    return {name: torch.full((2,), 4.0, requires_grad=True) for name in ("slow", "fast")}


def test_the_rate_rises_and_falls_to_nothing() -> None:
    shares = [rate_share(step, 10, 0.3) for step in range(10)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and shares[3] == 1
    assert shares[3:] == sorted(shares[3:], reverse=True) and 0 < shares[-1] < 0.06


def test_each_parameter_has_its_rate(tmp_path: Path) -> None:
    parameters = two()
    made(parameters, [0.01, 0.1]).run(RUN, tmp_path, lambda _: None, lambda _: bowl(parameters))
    # AdamW's step is the rate, whatever the gradient, while that keeps its sign.
    total = sum(rate_share(step, 10, 0.3) for step in range(10))
    assert parameters["slow"].tolist() == pytest.approx([4 - 0.01 * total] * 2, rel=1e-4)
    assert parameters["fast"].tolist() == pytest.approx([4 - 0.1 * total] * 2, rel=2e-2)


def test_it_goes_on_from_the_newest_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    whole, parted = two(), two()
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    made(whole, [0.01, 0.1]).run(RUN, tmp_path / "1", lambda _: None, lambda _: bowl(whole))

    def dies(start: int) -> Iterator[tuple[float, str]]:
        yield from bowl(parted, 6)
        raise KeyboardInterrupt

    said: list[str] = []
    starts: list[int] = []

    def goes_on(start: int) -> Iterator[tuple[float, str]]:
        starts.append(start)
        return bowl(parted, 10 - start)

    with pytest.raises(KeyboardInterrupt):
        made(parted, [0.01, 0.1]).run(RUN, tmp_path / "2", lambda _: None, dies)
    made(parted, [0.01, 0.1]).run(RUN, tmp_path / "2", said.append, goes_on)
    assert starts == [4] and said[0] == "resumed after step 4 of 10"
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_what_is_measured_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    parameters, said = two(), list[str]()
    asked: list[float] = []

    def measure() -> str:
        asked.append(float(parameters["fast"][0].detach()))
        return f", {len(asked)}"

    made(parameters, [0.01, 0.1]).run(
        RUN, tmp_path, said.append, lambda _: bowl(parameters), measure
    )
    # At the start, after 4 and 8 steps, and at the end.
    assert len(asked) == 4 and asked == sorted(asked, reverse=True)
    assert said[-1].startswith("step 10 of 10: loss ") and said[-1].endswith(", 4")


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    parameters = {"x": torch.zeros(2, requires_grad=True)}

    def root(start: int) -> Iterator[tuple[float, str]]:
        loss = parameters["x"].sqrt().sum()
        loss.backward()
        yield float(loss.detach()), ""

    with pytest.raises(BadRecipe, match=r"--rate.*not finite any more in step 1.*a lower one"):
        made(parameters, [0.1]).run(RUN, tmp_path, lambda _: None, root)
    assert parameters["x"].tolist() == [0, 0] and not list(tmp_path.iterdir())
