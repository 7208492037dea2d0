"""The read-out sum in torch, float32; `steering.kernels.reference` is the float64 definition.

Letters: R rows, V the base's vocabulary, S streams (base first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from steering.kernels.reference import SET_BACK
from steering.plan import RuleKind

NEVER = float("-inf")

BLOCK = 2048
"""Ids of the largest block of the Triton kernels, which read tables over the vocabulary whole."""


class Ends(NamedTuple):
    """The ids that end a text, which differ between requests."""

    table: torch.Tensor
    """[n, ≥ V] bool: n sets of ids."""
    which: torch.Tensor
    """[R] float32, the set of each row."""

    def of(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        """[r, size] bool: the sets of some rows."""
        return self.table[self.which[rows].long().clamp(0, len(self.table) - 1), :size]


def mix(
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    kind: torch.Tensor | None,
    stream: torch.Tensor,
    param: torch.Tensor,
    lacking: bool = True,
    critical: torch.Tensor | None = None,
    ends: Ends | None = None,
) -> torch.Tensor:
    """`z` for R rows.

    Args:
        logits: per stream [R, V] float32 raw scores, or None for a stream that no row uses. −∞ on
            ids that the stream lacks. Where a row's coefficient is 0 the stream's row is ignored,
            whatever it holds.
        coef: [R, S] float32 coefficients c_i.
        kind: [R] `RuleKind` as float32, or None when every row is a plain sum.
        stream: [R] float32, index of the stream that the rule reads.
        param: [R] float32, α, p or the threshold.
        lacking: False promises that no stream lacks an id that the base has, which saves work.
        critical: [R] float32 log-odds of the rows' heads; None if no row has a `CRITICAL` rule.
        ends: the ids that end a text; None for none. Of a row, fewer than V.

    Returns:
        [R, V] float32 scores; finite, but where the definition has no score for an id.
    """
    if critical is not None:
        assert kind is not None
        coef = _without_rule_stream(coef, kind, stream)
    z = weighted_sum(logits, coef)
    if kind is not None:
        _on_rows(kind == float(RuleKind.NUCLEUS), _nucleus, z, logits, coef, stream, param)
    if lacking:
        z = _no_delta(z, logits, coef, kind, stream)
    if kind is not None:
        _on_rows(kind == float(RuleKind.PLAUSIBLE), _plausible, z, logits, coef, stream, param)
    if critical is not None:
        assert kind is not None
        _critical(z, logits, stream, kind, param, critical, ends)
    return z


def _on_rows(
    which: torch.Tensor,
    rule: Callable[..., torch.Tensor],
    z: torch.Tensor,
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    stream: torch.Tensor,
    param: torch.Tensor,
) -> None:
    """Replaces the rows of `z` that a rule is for."""
    rows = torch.nonzero(which)[:, 0]
    if rows.numel():
        of_rule = [None if s is None else s[rows] for s in logits]
        z[rows] = rule(z[rows], of_rule, coef[rows], stream[rows].long(), param[rows])


def _no_delta(
    z: torch.Tensor,
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    kind: torch.Tensor | None,
    stream: torch.Tensor,
) -> torch.Tensor:
    """Ids that a stream of the sum lacks: `log p_0 + Σ c_i log Z_i` over the streams summed raw.

    A nucleus row sums only its anchor raw; the others are normalised there already.
    """
    base = logits[0]
    assert base is not None, "the base runs in every step"
    raw = coef
    if kind is not None:
        anchor = torch.nn.functional.one_hot(stream.long(), coef.shape[1]).to(coef.dtype)
        raw = torch.where((kind == float(RuleKind.NUCLEUS))[:, None], coef * anchor, coef)
    lacks = torch.zeros_like(z, dtype=torch.bool)
    offset = torch.zeros_like(coef[:, :1])
    for i, s in enumerate(logits):
        if s is None:
            continue
        if i:
            lacks |= (s == NEVER) & (coef[:, i : i + 1] != 0)
        c = raw[:, i : i + 1]
        offset += torch.where(c == 0, 0.0, c * s.logsumexp(-1, keepdim=True))
    back = (coef[:, :1] <= 0) * SET_BACK
    return torch.where(lacks, base.log_softmax(-1) + offset - back, z)


def weighted_sum(logits: Sequence[torch.Tensor | None], coef: torch.Tensor) -> torch.Tensor:
    """`Σ_i c_i s_i`, [R, V]; a zero coefficient contributes 0 even where s_i is not finite.

    An id that is −∞ in a stream of the sum is −∞, also under a negative coefficient.
    """
    total: torch.Tensor | None = None
    for i, s in enumerate(logits):
        if s is None:
            continue
        c = coef[:, i : i + 1]
        term = torch.where(c == 0, torch.zeros((), dtype=s.dtype, device=s.device), c * s)
        total = term if total is None else total + term
    assert total is not None, "no stream ran"
    return torch.where(torch.isfinite(total), total, NEVER)


def _of_stream(logits: Sequence[torch.Tensor | None], stream: torch.Tensor) -> torch.Tensor:
    """[R, V]: each row's scores of the stream it names."""
    present = next(s for s in logits if s is not None)
    chosen = torch.zeros_like(present)
    for i, s in enumerate(logits):
        if s is not None:
            chosen = torch.where((stream == i)[:, None], s, chosen)
    return chosen


def _plausible(
    z: torch.Tensor,
    logits: Sequence[torch.Tensor | None],
    _coef: torch.Tensor,
    stream: torch.Tensor,
    alpha: torch.Tensor,
) -> torch.Tensor:
    """Below all others where p_k(v) < α max p_k; on logits, so that no normaliser is needed."""
    s = _of_stream(logits, stream)
    floor = s.max(-1, keepdim=True).values + alpha.log()[:, None]
    least = z.masked_fill(z == NEVER, torch.inf).amin(-1, keepdim=True)
    back = SET_BACK + z.amax(-1, keepdim=True) - least
    return torch.where(s < floor, z - back, z)


def _nucleus(
    _z: torch.Tensor,
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    stream: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """`c_k s_k + Σ_{i≠k} c_i m log p_i`, m = 1 inside the top-p nucleus of stream k."""
    s = _of_stream(logits, stream)
    inside = nucleus(s, p)
    anchor = torch.nn.functional.one_hot(stream, coef.shape[1]).to(coef.dtype)
    normalised = [None if x is None else x.log_softmax(-1) for x in logits]
    delta = weighted_sum(normalised, coef * (1 - anchor))
    own = weighted_sum(logits, coef * anchor)
    return own + torch.where(inside, delta, torch.zeros((), dtype=s.dtype, device=s.device))


def nucleus(s: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[R, V] bool: the smallest set of most probable ids whose mass reaches p.

    An id is in iff the mass strictly before it, in falling order, is below p; ties go to the
    lower id.
    """
    order = torch.argsort(s, dim=-1, descending=True, stable=True)
    probability = s.softmax(-1).gather(-1, order)
    before = probability.cumsum(-1) - probability
    # p = 1 is every id, also where rounding makes the mass reach 1 early.
    inside = (before < p[:, None]) | (p >= 1)[:, None]
    return torch.zeros_like(s, dtype=torch.bool).scatter(-1, order, inside)


def _without_rule_stream(
    coef: torch.Tensor, kind: torch.Tensor, stream: torch.Tensor
) -> torch.Tensor:
    """[R, S] the coefficients of the aligned sum: `CRITICAL` rows do not add stream k."""
    rule = ((kind == float(RuleKind.CRITICAL)) | (kind == float(RuleKind.CRITICAL_MIX)))[:, None]
    k = torch.nn.functional.one_hot(stream.long(), coef.shape[1]).bool()
    return coef.masked_fill(rule & k, 0.0)


def _critical(
    z: torch.Tensor,
    logits: Sequence[torch.Tensor | None],
    stream: torch.Tensor,
    kind: torch.Tensor,
    param: torch.Tensor,
    critical: torch.Tensor,
    ends: Ends | None,
) -> None:
    """Replaces the critical rows of `z`, and mixes those of the soft rule."""
    hard = (kind == float(RuleKind.CRITICAL)) & (critical.sigmoid() > param)
    rows = torch.nonzero(hard)[:, 0]
    if rows.numel():
        ending = None if ends is None else ends.of(rows, z.shape[1])
        z[rows] = _only_best(z[rows], _rows_of_stream(logits, rows, stream), ending)
    rows = torch.nonzero(kind == float(RuleKind.CRITICAL_MIX))[:, 0]
    if rows.numel():
        ending = None if ends is None else ends.of(rows, z.shape[1])
        s = _rows_of_stream(logits, rows, stream)
        z[rows] = _blend(z[rows], s, critical[rows], ending)


def _rows_of_stream(
    logits: Sequence[torch.Tensor | None], rows: torch.Tensor, stream: torch.Tensor
) -> torch.Tensor:
    return _of_stream([None if s is None else s[rows] for s in logits], stream[rows].long())


def _only_best(z: torch.Tensor, s: torch.Tensor, ending: torch.Tensor | None) -> torch.Tensor:
    """A + log p_k(· | not E), `SET_BACK` lower but at its maximum; twice as much lower on E, and
    the sum thrice as much lower where k lacks the id.
    """
    scale = z.logsumexp(-1, keepdim=True)
    own = s if ending is None else s.masked_fill(ending, NEVER)
    own = own.log_softmax(-1) + scale
    best = own.argmax(-1, keepdim=True)
    found = (own - SET_BACK).scatter(-1, best, own.gather(-1, best))
    if ending is not None:
        found = torch.where(ending, s.log_softmax(-1) + scale - 2 * SET_BACK, found)
    return torch.where(s == NEVER, z - 3 * SET_BACK, found)


def _blend(
    z: torch.Tensor, s: torch.Tensor, log_odds: torch.Tensor, ending: torch.Tensor | None
) -> torch.Tensor:
    """`A + log((1 − q) p_a + q (1 − p_a(E)) p_k(· | not E))`, and the sum on E."""
    odds = log_odds[:, None]
    own, others = s, z
    if ending is not None:
        own, others = s.masked_fill(ending, NEVER), z.masked_fill(ending, NEVER)
    own = own.log_softmax(-1) + others.logsumexp(-1, keepdim=True)
    log = torch.nn.functional.logsigmoid
    mixed = torch.logaddexp(log(-odds) + z, log(odds) + own)
    return mixed if ending is None else torch.where(ending, z, mixed)
