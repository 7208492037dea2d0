"""λ-returns against their definition, a weighted sum of n-step returns, in float64."""

from __future__ import annotations

import random

import pytest
import torch

from adapters.training.value.returns import explained, targets


def n_step(values: list[float], reward: float, t: int, n: int, gamma: float) -> float:
    """What n steps give, and the value there; all of them give the reward."""
    length = len(values) - 1
    return gamma ** (length - t) * reward if t + n == length else gamma**n * values[t + n]


def lambda_return(
    values: list[float], reward: float, t: int, gamma: float, lambda_: float
) -> float:
    """(1 − λ) Σ λ^(n−1) G_t:t+n over n < L − t, and λ^(L−t−1) of the whole return."""
    left = len(values) - 1 - t
    if left == 0:
        return reward
    some = sum(
        (1 - lambda_) * lambda_ ** (n - 1) * n_step(values, reward, t, n, gamma)
        for n in range(1, left)
    )
    return some + lambda_ ** (left - 1) * n_step(values, reward, t, left, gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_targets_are_the_weighted_n_step_returns(gamma: float, lambda_: float) -> None:
    draw = random.Random(1)
    lengths = [0, 1, 2, 7, 12]
    rewards = [draw.gauss(0, 3) for _ in lengths]
    values = [[draw.gauss(0, 1) for _ in range(13)] for _ in lengths]
    padded = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    for row, length in zip(padded.data, lengths, strict=True):
        row[length + 1 :] = torch.nan  # What is behind a row's end is not read.
    found = targets(
        padded,
        torch.tensor(lengths),
        torch.tensor(rewards, dtype=torch.float64),
        gamma=gamma,
        lambda_=lambda_,
    )
    assert not found.requires_grad and found.dtype == torch.float64
    for i, length in enumerate(lengths):
        wanted = [
            lambda_return(values[i][: length + 1], rewards[i], t, gamma, lambda_)
            for t in range(length + 1)
        ]
        assert found[i, : length + 1].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        assert found[i, length:].tolist() == [rewards[i]] * (13 - length)


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained(returns, returns) == 1
    assert explained(torch.full((4,), 9.0), returns) == pytest.approx(0)
    assert explained(-returns, returns) == pytest.approx(-3)
    assert explained(returns, torch.ones(4)) is None
