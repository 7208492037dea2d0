"""The definition of the read-out sum: float64, one position, slow. Every fast path is held to it.

Letters: V the vocabulary, S streams.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from steering.plan import BASE, CRITICAL_KINDS, EndValue, Recipe, RuleKind

Scores = npt.NDArray[np.float64]
"""[V] float64."""


SET_BACK = 64.0
"""Nats. By how much ids lose to the one that a critical token must be: e^−64 has no weight beside
1 in float32, up to temperature 2 and with any vocabulary. It is finite so that what stands behind
the read-out (a grammar, a bias of −100) can still ban the one id and leaves something to draw."""


def mix_reference(
    recipe: Recipe, logits: Mapping[str, Scores], ends: Collection[int] = ()
) -> Scores:
    """`z` of one position; see `steering.plan.RuleKind` for the operations.

    A stream with coefficient exactly 0 is not in the sum, whatever it holds. An id that is −∞ in
    the base is −∞ in `z`, if the base is in the sum. An id that is −∞ in another stream of the sum
    is one that the stream lacks: it gets no delta, which means the base's log-probability beside
    the normalised sum of the others. Streams' raw scores have offsets of their own, so they are
    normalised over what they share before the two are compared. Where the base is not in the sum,
    or negatively, such an id is −∞. The `CRITICAL` rules do this to the sum without stream k.

    A critical token's scores are log p_k(v | v ∉ E), `SET_BACK` lower at every id but the most
    likely one (of equals the lowest), and log p_k − 2 `SET_BACK` on E, the ids that end a text.

    Args:
        recipe: weights and rule. Its `best` chooses among replies, not tokens: `best_reply`.
        logits: stream name → [V] raw scores, finite or −∞, for each weighted stream and the
            rule's; at least one is finite. Of a classifier head, the log-odds come first.
        ends: ids that end a text.

    A value stream's array holds the value after each id; ids that end the text count as any other
    here (`value_offsets` has the rules).

    Returns:
        [V] float64 scores, finite or −∞.

    Raises:
        KeyError: `logits` lacks a stream that the recipe uses.
    """
    weights = {stream: c for stream, c in recipe.weights.items() if c != 0}
    rule = recipe.rule
    if recipe.values is not None:
        added = mix_reference(Recipe(recipe.weights, rule), logits, ends)
        best = np.argsort(-logits[BASE], kind="stable")[: recipe.values.top_k]
        for stream, beta in recipe.values.strengths:
            after = logits[stream][best]
            added[best] += beta * value_offsets(after, 0.0, np.zeros(best.size, np.bool_), "model")
        return added
    if rule.kind in CRITICAL_KINDS:
        return _critical(recipe, logits, ends)
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


def value_offsets(
    values: Scores, prefix: float, ending: npt.NDArray[np.bool_], rule: EndValue
) -> Scores:
    """What one value model adds to the candidates at strength 1: V − mean V, [k].

    Args:
        values: [k] V(s⊕j).
        prefix: V(s).
        ending: [k] which candidates end the text.
        rule: what stands for the value of those.
    """
    if rule == "prefix":
        values = np.where(ending, prefix, values)
    counted = ~ending if rule == "zero" else np.ones_like(ending)
    if not counted.any():
        return np.zeros(values.shape)
    offsets: Scores = np.where(counted, values - values[counted].mean(), 0.0)
    return offsets


def best_reply(values: Sequence[float]) -> int:
    """Which of n replies is returned: the one with the largest value, of equals the first.

    Args:
        values: what the head says after each whole reply; one that is not finite loses.
    """
    return max(
        range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else -math.inf
    )


def _critical(recipe: Recipe, logits: Mapping[str, Scores], ends: Collection[int]) -> Scores:
    rule = recipe.rule
    aligned = {s: c for s, c in recipe.weights.items() if s != rule.stream}
    z = mix_reference(Recipe(aligned), logits)
    log_odds = float(logits[rule.head][0])
    q = 1 / (1 + math.exp(-log_odds))
    own = log_softmax(logits[rule.stream])
    ending = np.isin(np.arange(own.size), list(ends))
    if rule.kind is RuleKind.CRITICAL:
        if q <= rule.param:
            return z
        others = own - _log_mass(own[~ending])
        best = np.where(ending, -np.inf, others).argmax()
        kept = np.where(np.arange(own.size) == best, others, others - SET_BACK)
        return np.where(ending, own - 2 * SET_BACK, kept)
    ours = log_softmax(z)
    with np.errstate(divide="ignore"):
        rest = _log_mass(ours[~ending]) - _log_mass(own[~ending])
        mixed = np.logaddexp(np.log(1 - q) + ours, np.log(q) + own + rest)
    return np.where(ending, ours, mixed)


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
