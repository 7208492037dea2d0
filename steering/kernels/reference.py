"""The definition of the read-out sum: float64, one position, slow. Every fast path is held to it.

Letters: V the vocabulary, S streams.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from steering.plan import BASE, Recipe, RuleKind

Scores = npt.NDArray[np.float64]
"""[V] float64."""


def mix_reference(recipe: Recipe, logits: Mapping[str, Scores]) -> Scores:
    """`z` of one position; see `steering.plan.RuleKind` for the three operations.

    A stream with coefficient exactly 0 is not in the sum, whatever it holds. An id that is −∞ in
    the base is −∞ in `z`, if the base is in the sum. An id that is −∞ in another stream of the sum
    is one that the stream lacks: it gets no delta, which means the base's log-probability beside
    the normalised sum of the others. Streams' raw scores have offsets of their own, so they are
    normalised over what they share before the two are compared. Where the base is not in the sum,
    or negatively, such an id is −∞.

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
    size = next(iter(logits.values())).shape
    raw = weights
    if rule.kind is RuleKind.NUCLEUS:
        anchor = logits[rule.stream]
        rest = {stream: c for stream, c in weights.items() if stream != rule.stream}
        delta = _sum(rest, {stream: log_softmax(logits[stream]) for stream in rest}, size)
        raw = {stream: c for stream, c in weights.items() if stream == rule.stream}
        z: Scores = _sum(raw, logits, size) + np.where(nucleus(anchor, rule.param), delta, 0.0)
    else:
        z = _sum(weights, logits, size)
    lacking = np.zeros(size, np.bool_)
    for stream in set(weights) - {BASE}:
        lacking |= np.isneginf(logits[stream])
    if weights.get(BASE, 0.0) > 0:
        offset = sum(c * _log_mass(logits[stream]) for stream, c in raw.items())
        z[lacking] = (log_softmax(logits[BASE]) + offset)[lacking]
    else:
        z[lacking] = -np.inf
    if rule.kind is RuleKind.PLAUSIBLE:
        judge = logits[rule.stream]
        z[judge < judge.max() + np.log(rule.param)] = -np.inf
    return z


def log_softmax(scores: Scores) -> Scores:
    """The log-probabilities, [V]."""
    normalised: Scores = scores - _log_mass(scores)
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


def _log_mass(scores: Scores) -> float:
    """Log Σ exp, finite."""
    peak = scores.max()
    return float(peak + np.log(np.exp(scores - peak).sum()))


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
