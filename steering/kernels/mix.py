"""The read-out sum in torch, float32; `steering.kernels.reference` is the float64 definition.

Letters: R rows, V the base's vocabulary, S streams (base first).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from steering.kernels.reference import SET_BACK
from steering.plan import RuleKind

NEVER = float("-inf")

BLOCK = 2048
"""Ids of the largest block of the Triton kernels, which read tables over the vocabulary whole."""


FEW_ROWS = 16
"""Rows up to which the kernels' blocks are smaller: few rows would give few programs."""


class Ends(NamedTuple):
    """The ids that end a text, which differ between requests."""

    table: torch.Tensor
    """[n, ≥ V] bool: n sets of ids."""
    which: torch.Tensor
    """[R] float32, the set of each row."""

    def of(self, rows: torch.Tensor | slice, size: int) -> torch.Tensor:
        """[r, size] bool: the sets of some rows."""
        return self.table[self.which[rows].long().clamp(0, len(self.table) - 1), :size]


class Measures(NamedTuple):
    """What reports say of n rows, each [n]: float32, and int64 ids."""

    kl: torch.Tensor
    """KL(z ‖ base) in nats."""
    mass: torch.Tensor
    """Log Σ exp of z."""
    base_mass: torch.Tensor
    """The same of the base."""
    choice: torch.Tensor
    """The most likely id of z; of equals the lowest."""
    base_choice: torch.Tensor
    """The same of the base."""


def measure(z: torch.Tensor, base: torch.Tensor) -> Measures:
    """Compares [n, V] float32 scores with the base's; `reference.measure_reference` in torch."""
    mass, base_mass = z.logsumexp(-1), base.logsumexp(-1)
    steered = z - mass[:, None]
    probability = steered.exp()
    gap = torch.where(probability > 0, steered - (base - base_mass[:, None]), 0.0)
    return Measures((probability * gap).sum(-1), mass, base_mass, z.argmax(-1), base.argmax(-1))


def rows_where(mask: torch.Tensor) -> torch.Tensor | None:
    """[n] int64 rows where a mask holds; None on a device that the host would have to wait for.

    There a caller computes all rows and selects by the mask.
    """
    return torch.nonzero(mask)[:, 0] if mask.device.type == "cpu" else None


def mix(
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    kind: torch.Tensor | None,
    stream: torch.Tensor,
    param: torch.Tensor,
    lacking: bool = True,
    critical: torch.Tensor | None = None,
    ends: Ends | None = None,
    kinds: Collection[RuleKind] = tuple(RuleKind),
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
        kinds: rules that occur among the rows, or more.

    Returns:
        [R, V] float32 scores; finite, but where the definition has no score for an id.
    """
    if critical is not None:
        assert kind is not None
        coef = _without_rule_stream(coef, kind, stream)
    z = weighted_sum(logits, coef)
    rule = _Rows(logits, coef, stream.long(), param)
    if kind is not None and RuleKind.NUCLEUS in kinds:
        z = _replaced(z, kind == float(RuleKind.NUCLEUS), rule, _nucleus)
    if lacking:
        z = _no_delta(z, logits, coef, kind, stream)
    if kind is not None and RuleKind.PLAUSIBLE in kinds:
        z = _replaced(z, kind == float(RuleKind.PLAUSIBLE), rule, _plausible)
    if critical is not None:
        assert kind is not None
        rule = rule._replace(odds=critical, ends=ends)
        if RuleKind.CRITICAL in kinds:
            hard = (kind == float(RuleKind.CRITICAL)) & (critical.sigmoid() > param)
            z = _replaced(z, hard, rule, _only_best)
        if RuleKind.CRITICAL_MIX in kinds:
            z = _replaced(z, kind == float(RuleKind.CRITICAL_MIX), rule, _blend)
    return z


class _Rows(NamedTuple):
    """What the rules read of R rows."""

    logits: Sequence[torch.Tensor | None]
    coef: torch.Tensor
    stream: torch.Tensor
    param: torch.Tensor
    odds: torch.Tensor | None = None
    ends: Ends | None = None

    def take(self, rows: torch.Tensor) -> _Rows:
        """Some of the rows."""
        return _Rows(
            [None if s is None else s[rows] for s in self.logits],
            self.coef[rows],
            self.stream[rows],
            self.param[rows],
            None if self.odds is None else self.odds[rows],
            None if self.ends is None else self.ends._replace(which=self.ends.which[rows]),
        )

    def ending(self, size: int) -> torch.Tensor | None:
        """[R, size] bool: the ids that end a text; None if nothing does."""
        return None if self.ends is None else self.ends.of(slice(None), size)

    def chosen(self) -> torch.Tensor:
        """[R, V]: each row's scores of the stream that its rule reads."""
        present = next(s for s in self.logits if s is not None)
        chosen = torch.zeros_like(present)
        for i, s in enumerate(self.logits):
            if s is not None:
                chosen = torch.where((self.stream == i)[:, None], s, chosen)
        return chosen


def _replaced(
    z: torch.Tensor,
    which: torch.Tensor,
    rows: _Rows,
    rule: Callable[[torch.Tensor, _Rows], torch.Tensor],
) -> torch.Tensor:
    """[R, V] `z` with the rows that a rule is for as the rule makes them."""
    some = rows_where(which)
    if some is None:
        return torch.where(which[:, None], rule(z, rows), z)
    if some.numel():
        z[some] = rule(z[some], rows.take(some))
    return z


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
        others = ~_of_rule(stream, coef.shape[1])
        raw = coef.masked_fill((kind == float(RuleKind.NUCLEUS))[:, None] & others, 0.0)
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


def _plausible(z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """Below all others where p_k(v) < α max p_k; on logits, so that no normaliser is needed."""
    s = rows.chosen()
    floor = s.max(-1, keepdim=True).values + rows.param.log()[:, None]
    least = z.masked_fill(z == NEVER, torch.inf).amin(-1, keepdim=True)
    back = SET_BACK + z.amax(-1, keepdim=True) - least
    return torch.where(s < floor, z - back, z)


def _nucleus(_z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """`c_k s_k + Σ_{i≠k} c_i m log p_i`, m = 1 inside the top-p nucleus of stream k."""
    s = rows.chosen()
    inside = nucleus(s, rows.param)
    anchor = _of_rule(rows.stream, rows.coef.shape[1])
    normalised = [None if x is None else x.log_softmax(-1) for x in rows.logits]
    delta = weighted_sum(normalised, rows.coef.masked_fill(anchor, 0.0))
    own = weighted_sum(rows.logits, rows.coef.masked_fill(~anchor, 0.0))
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
    return coef.masked_fill(rule & _of_rule(stream, coef.shape[1]), 0.0)


def _of_rule(stream: torch.Tensor, streams: int) -> torch.Tensor:
    """[R, S] bool: whether a stream is the one that the row's rule reads."""
    return stream[:, None] == torch.arange(streams, device=stream.device)


def _only_best(z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """A + log p_k(· | not E), `SET_BACK` lower but at its maximum; twice as much lower on E, and
    the sum thrice as much lower where k lacks the id.
    """
    s, ending = rows.chosen(), rows.ending(z.shape[1])
    scale = z.logsumexp(-1, keepdim=True)
    own = s if ending is None else s.masked_fill(ending, NEVER)
    own = own.log_softmax(-1) + scale
    best = own.argmax(-1, keepdim=True)
    only = (own - SET_BACK).scatter(-1, best, own.gather(-1, best))
    if ending is not None:
        only = torch.where(ending, s.log_softmax(-1) + scale - 2 * SET_BACK, only)
    return torch.where(s == NEVER, z - 3 * SET_BACK, only)


def _blend(z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """`A + log((1 − q) p_a + q (1 − p_a(E)) p_k(· | not E))`, and the sum on E."""
    assert rows.odds is not None
    odds, ending = rows.odds[:, None], rows.ending(z.shape[1])
    own, others = rows.chosen(), z
    if ending is not None:
        own, others = own.masked_fill(ending, NEVER), z.masked_fill(ending, NEVER)
    own = own.log_softmax(-1) + others.logsumexp(-1, keepdim=True)
    log = torch.nn.functional.logsigmoid
    mixed = torch.logaddexp(log(-odds) + z, log(odds) + own)
    return mixed if ending is None else torch.where(ending, z, mixed)
