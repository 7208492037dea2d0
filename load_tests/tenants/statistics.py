"""Whether two samples of times can be told apart: a rank-sum test by permutation.

The statistic is that of Mann and Whitney (1947), U / (m n): the probability that a time of the
first sample is shorter than one of the second, ties counting half. It is 0.5 where the two cannot
be told apart, and serves as the effect size too. Its p-value is the share of random divisions of
the pooled times into two samples whose statistic is as far from 0.5 (Ernst 2004, Permutation
Methods: A Basis for Exact Inference), so nothing is assumed of how the times are distributed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Comparison:
    """Two samples, compared.

    Args:
        counts: how many times each has.
        medians: of each, in the unit of the times.
        faster: the probability that a time of the first is shorter than one of the second.
        p: of the hypothesis that both are of one distribution, two-sided; at least
            1 / (permutations + 1).
        difference: the median of the second minus that of the first.
        interval: where 95 % of the bootstrapped differences lie.
    """

    counts: tuple[int, int]
    medians: tuple[float, float]
    faster: float
    p: float
    difference: float
    interval: tuple[float, float]


def ranks(times: np.ndarray) -> np.ndarray:
    """[N] the rank of each time, from 1; equal times share the mean of their ranks.

    Args:
        times: [N].
    """
    _, inverse, counts = np.unique(times, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return shared


def probability_faster(pooled: np.ndarray, first: np.ndarray, m: int, n: int) -> np.ndarray:
    """[...] U / (m n) of divisions of pooled ranks.

    Args:
        pooled: [m + n] ranks.
        first: [..., m] which of them are the first sample's.
        m: size of the first sample.
        n: size of the second.
    """
    sums: np.ndarray = pooled[first].sum(axis=-1)
    shorter: np.ndarray = 1 - (sums - m * (m + 1) / 2) / (m * n)
    return shorter


def compare(
    first: list[float], second: list[float], seed: int = 0, permutations: int = PERMUTATIONS
) -> Comparison:
    """The comparison of two samples.

    Args:
        first: its times.
        second: its times.
        seed: of permutations and bootstrap.
        permutations: how many divisions are drawn.

    Raises:
        ValueError: a sample is empty.
    """
    m, n = len(first), len(second)
    if not m or not n:
        raise ValueError(f"both samples need times (got {m} and {n})")
    dice = np.random.default_rng(seed)
    a, b = np.array(first), np.array(second)
    pooled = ranks(np.concatenate([a, b]))
    found = float(probability_faster(pooled, np.arange(m), m, n))
    # A random order of all; its first m are the first sample.
    orders = np.argsort(dice.random((permutations, m + n)), axis=1)[:, :m]
    drawn = probability_faster(pooled, orders, m, n)
    as_far = int((np.abs(drawn - 0.5) >= abs(found - 0.5) - 1e-12).sum())
    medians = (float(np.median(a)), float(np.median(b)))
    resampled = np.median(dice.choice(b, (2000, n)), axis=1) - np.median(
        dice.choice(a, (2000, m)), axis=1
    )
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Comparison(
        (m, n), medians, found, (as_far + 1) / (permutations + 1), medians[1] - medians[0],
        (float(low), float(high)),
    )  # fmt: skip
