"""The definition of the read-out sum: float64, one position, slow. Every fast path is held to it.

Letters: V the vocabulary, S streams.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from steering.plan import Recipe, RuleKind

Scores = npt.NDArray[np.float64]
"""[V] float64."""


def mix_reference(recipe: Recipe, logits: Mapping[str, Scores]) -> Scores:
    """`z` of one position; see `steering.plan.RuleKind` for the three operations.

    A stream with coefficient exactly 0 is not in the sum, whatever it holds. An id that is −∞ in
    a stream of the sum is −∞ in `z`, also where the coefficient is negative.

    Args:
        recipe: weights and rule.
        logits: stream name → [V] raw scores, finite or −∞, for each weighted stream and the
            rule's; at least one is finite.

    Returns:
        [V] float64 scores, finite or −∞.

    Raises:
        KeyError: `logits` lacks a stream that the recipe uses.
    """
    weights = {stream: c for stream, c in recipe.weights.items() if c != 0}
    rule = recipe.rule
    if rule.kind is RuleKind.NUCLEUS:
        anchor = logits[rule.stream]
        rest = {stream: c for stream, c in weights.items() if stream != rule.stream}
        delta = _sum(rest, {stream: log_softmax(logits[stream]) for stream in rest}, anchor.shape)
        own = {stream: c for stream, c in weights.items() if stream == rule.stream}
        inside = nucleus(anchor, rule.param)
        z: Scores = _sum(own, logits, anchor.shape) + np.where(inside, delta, 0.0)
        return z
    size = next(iter(logits.values())).shape
    z = _sum(weights, logits, size)
    if rule.kind is RuleKind.PLAUSIBLE:
        judge = logits[rule.stream]
        z[judge < judge.max() + np.log(rule.param)] = -np.inf
    return z


def log_softmax(scores: Scores) -> Scores:
    """The log-probabilities, [V]."""
    peak = scores.max()
    normalised: Scores = scores - (peak + np.log(np.exp(scores - peak).sum()))
    return normalised


def nucleus(scores: Scores, p: float) -> npt.NDArray[np.bool_]:
    """[V] bool: the smallest set of most probable ids whose probability reaches p.

    An id is in iff the mass strictly before it, in falling order, is below p; ties go to the
    lower id. p = 1 is every id, also where rounding makes the mass reach 1 early.
    """
    if p >= 1:
        return np.ones(scores.shape, np.bool_)
    order = np.argsort(-scores, kind="stable")
    mass = np.cumsum(np.exp(log_softmax(scores))[order])
    before = np.concatenate([[0.0], mass[:-1]])
    inside = np.zeros(scores.shape, np.bool_)
    inside[order[before < p]] = True
    return inside


def _sum(
    weights: Mapping[str, float], logits: Mapping[str, Scores], shape: tuple[int, ...]
) -> Scores:
    total = np.zeros(shape)
    ruled_out = np.zeros(shape, np.bool_)
    for stream, c in weights.items():
        finite = np.isfinite(logits[stream])
        ruled_out |= ~finite
        total += c * np.where(finite, logits[stream], 0.0)
    return np.where(ruled_out, -np.inf, total)
