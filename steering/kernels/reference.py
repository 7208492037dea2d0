"""The definition of the read-out sum: float64, one position, slow. Every fast path is held to it.

Letters: V the vocabulary, S streams.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from steering.plan import (
    BASE,
    Ender,
    EndValue,
    Gate,
    LayerKind,
    LayerRule,
    Recipe,
    Rule,
    RuleKind,
    Transform,
)

Scores = npt.NDArray[np.float64]
"""[V] float64."""


SET_BACK = 256.0
"""Nats. By how much ids lose that a rule sets back: ones that are not plausible, or not the one
that a critical token must be. More than the 200 by which two biases (`logit_bias`, ±100) can move
two ids against each other; and at temperature 2 it leaves e^−128, no weight in float32 beside 1
with any vocabulary. It is finite: what stands behind the read-out (a grammar, `bad_words`, …) may
forbid every other id, and must find something to draw, in an order that means something."""

FLOOR = math.log(1e-8)
"""Least log-probability where one distribution is subtracted from another: SafeDecoding's
(arXiv 2402.08983, its code)."""


def mix_reference(
    recipe: Recipe, logits: Mapping[str, Scores], ends: Collection[int] = (), n: int = 0
) -> Scores:
    """`z` of one position; see `steering.plan.RuleKind` for the operations.

    A stream with coefficient exactly 0 is not in the sum, whatever it holds. An id that is −∞ in
    the base is −∞ in `z`, if the base is in the sum. An id that is −∞ in another stream of the sum
    is one that the stream lacks: it gets no delta, which means the base's log-probability beside
    the normalised sum of the others. Streams' raw scores have offsets of their own, so they are
    normalised over what they share before the two are compared. Where the base is not in the sum,
    or negatively, such an id is set back: `SET_BACK` lower than that. `SELECT` does all this to the
    sum without stream k.

    `PLAUSIBLE` sets implausible ids back by `SET_BACK` more than the scores of the sum differ
    (the largest less the least finite one), which keeps their order and puts each of them
    `SET_BACK` below every plausible one.

    Every row of a `SELECT` request has the scale of its sum z_a, with A = log Σ exp z_a:
    penalties, which depend on the sign of a score, must not see another scale where k writes. Where
    a hard gate is open the scores are A + log p_k; with `Rule.best` `SET_BACK` lower at every id
    but the most likely one (of equals the lowest). With `Ender.SUM` that is p_k(· | not E), and
    A + log p_k − 2 `SET_BACK` on E, the ids that end a text. z_a − 3 `SET_BACK` where stream k
    lacks the id. With a count, ids that are not on top of both sides have z_a − `SET_BACK` +
    `FLOOR`, and the others at least A + `FLOOR`.

    Args:
        recipe: weights and rule. Its `best` chooses among replies, not tokens: `best_reply`.
        logits: stream name → [V] raw scores, finite or −∞, for each weighted stream and the
            rule's; at least one is finite. Of a classifier head, the log-odds come first.
        ends: ids that end a text: the base's, and the request's own stop ids.
        n: which token of the reply it is for, 0-based. Phases that a text bounds are not looked at:
            `steering.phases.holding` says which holds.

    A value stream's array holds the value after each id; ids that end the text count as any other
    here (`value_offsets` has the rules).

    Returns:
        [V] float64 scores; −∞ only where the base's is (or, without the base in the sum, every
        stream's).

    Raises:
        KeyError: `logits` lacks a stream that the recipe uses.
    """
    for phase in reversed(recipe.phases):
        if phase.span.start <= n and (phase.span.stop is None or n < phase.span.stop):
            there = Recipe(phase.weights, phase.rule, phase.values, layers=phase.layers)
            return mix_reference(there, logits, ends)
    if recipe.layers is not None:
        return _layered(recipe, recipe.layers, logits)
    weights = {stream: c for stream, c in recipe.weights.items() if c != 0}
    rule = recipe.rule
    if recipe.values is not None:
        added = mix_reference(Recipe(recipe.weights, rule), logits, ends)
        asked = recipe.values
        best = np.argsort(-logits[BASE], kind="stable")[: asked.top_k]
        for stream, beta in asked.strengths:
            after, none = logits[stream][best], np.zeros(best.size, np.bool_)
            offsets = value_offsets(after, 0.0, none, "model", asked.transform, asked.centre)
            added[best] += beta * offsets
        if asked.mask:
            known = added[np.isfinite(added)]
            others = ~np.isin(np.arange(added.size), best)
            added[others] -= SET_BACK + known.max() - known.min()
        return added
    if rule.kind is RuleKind.SELECT:
        return _select(recipe, logits, ends)
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
    if lacking.any():
        offset = sum(c * _log_mass(logits[stream]) for stream, c in raw.items())
        back = 0.0 if weights.get(BASE, 0.0) > 0 else SET_BACK
        z[lacking] = (log_softmax(logits[BASE]) + offset - back)[lacking]
    if rule.kind is RuleKind.PLAUSIBLE:
        judge = logits[rule.stream]
        scores = z[np.isfinite(z)]
        floor = judge.max() + np.log(rule.param)
        floor = min(floor, np.sort(judge)[::-1][how_many(rule.count, judge.size) - 1])
        z[judge < floor] -= SET_BACK + scores.max() - scores.min()
    return z


def value_offsets(
    values: Scores,
    prefix: float,
    ending: npt.NDArray[np.bool_],
    rule: EndValue,
    transform: Transform = "identity",
    centre: bool = True,
) -> Scores:
    """One value model's additions to the candidates at strength 1: V − mean V, [k].

    Args:
        values: [k] V(s⊕j).
        prefix: V(s).
        ending: [k] which candidates end the text.
        rule: what stands for the value of those.
        transform: of each value, before anything else.
        centre: whether the mean is taken off.
    """
    if transform == "log_sigmoid":
        values, prefix = -np.logaddexp(0.0, -values), _log_sigmoid(prefix)
    elif transform == "clip":
        values, prefix = values.clip(0, 1), min(max(prefix, 0.0), 1.0)
    if rule == "prefix":
        values = np.where(ending, prefix, values)
    counted = ~ending if rule == "zero" else np.ones_like(ending)
    if not counted.any():
        return np.zeros(values.shape)
    mean = values[counted].mean() if centre else 0.0
    offsets: Scores = np.where(counted, values - mean, 0.0)
    return offsets


def best_reply(values: Sequence[float]) -> int:
    """Which of n replies is returned: the one with the largest value, of equals the first.

    Args:
        values: what the head says after each whole reply; one that is not finite loses.
    """
    return max(
        range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else -math.inf
    )


def measure_reference(z: Scores, base: Scores) -> tuple[float, int, int]:
    """What a report says of one position: (KL(z ‖ base) in nats, most likely ids of z and base).

    Args:
        z: [V] scores of the steered model, −∞ where an id cannot be drawn.
        base: [V] the base's own.
    """
    steered, plain = log_softmax(z), log_softmax(base)
    with np.errstate(invalid="ignore"):
        gap = np.where(np.isneginf(steered), 0.0, np.exp(steered) * (steered - plain))
    return float(gap.sum()), int(z.argmax()), int(base.argmax())


def _layered(recipe: Recipe, layers: LayerRule, logits: Mapping[str, Scores]) -> Scores:
    """A rule over layers; ids that are −∞ in the base are left out of every distribution."""
    base = logits[BASE]
    lost = np.isneginf(base)
    taps = [stream for stream, c in recipe.weights.items() if c < 0]
    early = {stream: np.where(lost, -np.inf, logits[stream]) for stream in taps}
    if layers.kind is LayerKind.EVOLVE:
        return evolved(base, list(early.values()), layers.rate, layers.top_k)
    jsd = layers.kind is LayerKind.CONTRAST_JSD
    chosen = max(early, key=lambda stream: divergence(base, early[stream], jsd=jsd))
    weights = {stream: c for stream, c in recipe.weights.items() if c >= 0 or stream == chosen}
    shift = sum(c * _log_mass(logits[s] if s == BASE else early[s]) for s, c in weights.items())
    return mix_reference(Recipe(weights, recipe.rule), {**logits, **early}) - shift


def divergence(final: Scores, early: Scores, *, jsd: bool) -> float:
    """How far the distributions of two layers differ, in nats.

    `½ (KL(M ‖ p) + KL(M ‖ q))` with M = ½ (p + q), or with `jsd` `½ (KL(p ‖ M) + KL(q ‖ M))`.

    Args:
        final: [V] scores of the last layer.
        early: [V] scores of the other, −∞ where those are.
        jsd: whether it is the Jensen-Shannon divergence.
    """
    known = np.isfinite(final)
    p, q = log_softmax(final)[known], log_softmax(early)[known]
    mean = np.logaddexp(p, q) - math.log(2)
    if jsd:
        return float((np.exp(p) * (p - mean) + np.exp(q) * (q - mean)).sum() / 2)
    return float((np.exp(mean) * (2 * mean - p - q)).sum() / 2)


EVOLUTION_STEPS = 10
"""Steps of `evolved`."""

MOST_KEPT = 128
"""Ids that `evolved` may keep."""


def evolved(final: Scores, early: Sequence[Scores], rate: float, top_k: int) -> Scores:
    """The last layer's scores after SLED's steps (arXiv 2411.02433), [V].

    For layer n and id i of the k most likely, c_ni is the cosine of z_n − z and p_n − e_i; the
    latent distribution P(i) is the share of m_ni = max(c_ni, 0)² in all of them. Then, for
    t = 0 … 9, z ← z − rate (1 − t/10) (softmax(z) − P). Ids outside the k are set back as
    implausible ones are; an id as likely as the k-th is inside.

    Args:
        final: [V] scores of the last layer.
        early: [V] scores of each other layer, −∞ where those are.
        rate: > 0.
        top_k: k ≥ 1.
    """
    known = np.isfinite(final)
    z = final[known]
    inside = z >= np.sort(z)[::-1][:top_k][-1]
    latent = np.zeros(z.size)
    for scores in early:
        change, p = scores[known] - z, np.exp(log_softmax(scores[known]))
        for i in np.flatnonzero(inside):
            towards = p - np.eye(1, z.size, i)[0]
            length = np.linalg.norm(change) * np.linalg.norm(towards)
            latent[i] += max(0.0, float(change @ towards) / length if length else 0.0) ** 2
    if latent.any():
        latent /= latent.sum()
    for t in range(EVOLUTION_STEPS):
        step = rate * (1 - t / EVOLUTION_STEPS)
        z = z - step * (np.exp(log_softmax(z)) - latent)
    found = final.copy()
    found[known] = np.where(inside, z, z - (SET_BACK + z.max() - z.min()))
    return found


def how_many(count: float, size: int) -> int:
    """How many ids a `Rule.count` stands for, 1 to `size`; below 1 it is a share, in float32."""
    share = np.float32(count) * np.float32(size) if 0 < count < 1 else count
    return int(np.clip(math.floor(share), 1, size))


def _select(recipe: Recipe, logits: Mapping[str, Scores], ends: Collection[int]) -> Scores:
    rule = recipe.rule
    z = mix_reference(Recipe({s: c for s, c in recipe.weights.items() if s != rule.stream}), logits)
    scale = _log_mass(z)
    own = log_softmax(logits[rule.stream])
    ending = np.isin(np.arange(own.size), list(ends))
    opened, log_q, log_rest = _gate(rule, logits, z - scale, ending)
    if not opened:
        return z
    barred = ending if rule.ender is Ender.SUM else np.zeros_like(ending)
    others = own - _log_mass(own[~barred]) + scale
    if rule.hard:
        found = others
        if rule.best:
            best = np.where(barred, -np.inf, others).argmax()
            found = np.where(np.arange(own.size) == best, others, others - SET_BACK)
        found = np.where(barred, own + scale - 2 * SET_BACK, found)
        return np.where(np.isneginf(own), z - 3 * SET_BACK, found)
    theirs = others + _log_mass(z[~barred]) - scale
    if rule.count == 0:
        mixed = np.logaddexp(log_rest + z, log_q + theirs)
        return np.where(barred, z, mixed)
    p = (1 - rule.param) * np.exp(z - scale) + rule.param * np.exp(own)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = scale + np.maximum(np.log(p), FLOOR)
    inside = shared(z, own, how_many(rule.count, own.size))
    found = np.where(inside, np.where(p > 0, mixed, scale + FLOOR), z - SET_BACK + FLOOR)
    return np.where(np.isneginf(z), z, found)


def _gate(
    rule: Rule, logits: Mapping[str, Scores], log_p: Scores, ending: npt.NDArray[np.bool_]
) -> tuple[bool, float, float]:
    """(whether it is open, log q, log |1 − q|); log_p is log p_a."""
    if rule.gate is Gate.HEAD:
        odds = float(logits[rule.head][0])
        log_q, log_rest = _log_sigmoid(odds), _log_sigmoid(-odds)
        opened = math.exp(log_q) > rule.param or (not rule.hard and rule.param == 0)
    elif rule.gate is Gate.DOUBT:
        log_rest = min(float(log_p.max()), 0.0)
        doubt = -math.expm1(log_rest)
        log_q = math.log(doubt) if doubt > 0 else -math.inf
        opened = math.exp(log_rest) < rule.param
    else:
        rest = abs(1 - rule.param)
        log_q, log_rest = math.log(rule.param), math.log(rest) if rest else -math.inf
        opened = True
    if rule.ender is Ender.STREAM and ending.any():
        opened |= bool(log_p[ending].max() > log_p[~ending].max(initial=-math.inf))
    return opened, log_q, log_rest


def shared(one: Scores, other: Scores, count: int) -> npt.NDArray[np.bool_]:
    """[V] bool: the ids that the top n of both have in common, n ≥ count the least number with
    which they are `count` or more; ties go to the lower id (arXiv 2402.08983, section 4).
    """
    tops = [np.argsort(-scores, kind="stable") for scores in (one, other)]
    found = np.zeros(one.size, np.bool_)
    for n in range(count, one.size + 1):
        common = np.intersect1d(tops[0][:n], tops[1][:n])
        if common.size >= count:
            found[common] = True
            break
    return found


def _log_sigmoid(x: float) -> float:
    return -float(np.logaddexp(0.0, -x))


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
