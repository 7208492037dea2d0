"""The read-out sum in torch, float32; `steering.kernels.reference` is the float64 definition.

Letters: R rows, V the base's vocabulary, S streams (base first).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Self

import torch

from steering.kernels.reference import FLOOR, SET_BACK
from steering.plan import Ender, Gate, RuleKind

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


class Rules(NamedTuple):
    """The rules of R rows, [R] float32 each; names as in `steering.plan.Rule`."""

    kind: torch.Tensor
    """`RuleKind`."""
    stream: torch.Tensor
    """Index of the stream that the rule reads."""
    param: torch.Tensor
    counts: torch.Tensor
    options: torch.Tensor
    odds: torch.Tensor | None = None
    """Log-odds of the rows' heads; None if no rule reads one."""
    ends: Ends | None = None
    """The ids that end a text; None for none. Of a row, fewer than V."""
    kinds: Collection[RuleKind] = tuple(RuleKind)
    """Kinds that occur, or more."""
    searched: bool = True
    """False promises that no row has a nucleus, or a count of plausible ids above 1."""
    shared: bool = True
    """False promises that no `SELECT` has a count."""

    @classmethod
    def of(cls, table: torch.Tensor) -> Self:
        """Those of a table's columns, [R, 5] or with log-odds [R, 6]."""
        kind, stream, param, counts, options, *odds = table.unbind(1)
        return cls(kind, stream, param, counts, options, odds[0] if odds else None)

    def take(self, rows: torch.Tensor) -> Rules:
        """Those of some rows, [n] int64."""
        return self._replace(
            kind=self.kind[rows],
            stream=self.stream[rows],
            param=self.param[rows],
            counts=self.counts[rows],
            options=self.options[rows],
            odds=None if self.odds is None else self.odds[rows],
            ends=None if self.ends is None else self.ends._replace(which=self.ends.which[rows]),
        )


class Options(NamedTuple):
    """What `Rule.options` holds, [R, 1] int64 and bool; random bits give what no row has."""

    gate: torch.Tensor
    hard: torch.Tensor
    ender: torch.Tensor
    best: torch.Tensor

    @classmethod
    def of(cls, options: torch.Tensor) -> Options:
        """Those of [R] float32 numbers."""
        bits = options.clamp(0, 127).long()[:, None]
        return cls(bits & 3, (bits & 4) > 0, bits >> 3 & 3, (bits & 32) > 0)


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
    rules: Rules | None = None,
    lacking: bool = True,
) -> torch.Tensor:
    """`z` for R rows.

    Args:
        logits: per stream [R, V] float32 raw scores, or None for a stream that no row uses. −∞ on
            ids that the stream lacks. Where a row's coefficient is 0 the stream's row is ignored,
            whatever it holds.
        coef: [R, S] float32 coefficients c_i.
        rules: of the rows; None when every row is a plain sum.
        lacking: False promises that no stream lacks an id that the base has, which saves work.

    Returns:
        [R, V] float32 scores; finite, but where the definition has no score for an id.
    """
    kinds = () if rules is None else rules.kinds
    if rules is not None and RuleKind.SELECT in kinds:
        apart = (rules.kind == float(RuleKind.SELECT))[:, None]
        coef = coef.masked_fill(apart & _of_rule(rules.stream, coef.shape[1]), 0.0)
    z = weighted_sum(logits, coef)
    rows = None if rules is None else _Rows(logits, coef, rules)
    if rows is not None and RuleKind.NUCLEUS in kinds:
        z = _replaced(z, RuleKind.NUCLEUS, rows, _nucleus)
    if lacking:
        z = _no_delta(z, logits, coef, rules)
    if rows is not None and RuleKind.PLAUSIBLE in kinds:
        z = _replaced(z, RuleKind.PLAUSIBLE, rows, _plausible)
    if rows is not None and RuleKind.SELECT in kinds:
        z = _replaced(z, RuleKind.SELECT, rows, _select)
    return z


class _Rows(NamedTuple):
    """What the rules read of R rows."""

    logits: Sequence[torch.Tensor | None]
    coef: torch.Tensor
    rules: Rules

    def take(self, rows: torch.Tensor) -> _Rows:
        """Some of the rows."""
        logits = [None if s is None else s[rows] for s in self.logits]
        return _Rows(logits, self.coef[rows], self.rules.take(rows))

    def chosen(self) -> torch.Tensor:
        """[R, V]: each row's scores of the stream that its rule reads; not to be changed."""
        present = next(s for s in self.logits if s is not None)
        which = self.rules.stream
        if present.device.type == "cpu" and len(which) and bool((which == which[0]).all()):
            only = self.logits[int(which[0])]
            return torch.zeros_like(present) if only is None else only
        chosen = torch.zeros_like(present)
        for i, s in enumerate(self.logits):
            if s is not None:
                chosen = torch.where((self.rules.stream == i)[:, None], s, chosen)
        return chosen


def _replaced(
    z: torch.Tensor,
    kind: RuleKind,
    rows: _Rows,
    rule: Callable[[torch.Tensor, _Rows], torch.Tensor],
) -> torch.Tensor:
    """[R, V] `z` with the rows that a rule is for as the rule makes them."""
    which = rows.rules.kind == float(kind)
    some = rows_where(which)
    if some is None:
        return torch.where(which[:, None], rule(z, rows), z)
    if len(some) == len(z):
        return rule(z, rows)
    if len(some):
        z[some] = rule(z[some], rows.take(some))
    return z


def _no_delta(
    z: torch.Tensor,
    logits: Sequence[torch.Tensor | None],
    coef: torch.Tensor,
    rules: Rules | None,
) -> torch.Tensor:
    """Ids that a stream of the sum lacks: `log p_0 + Σ c_i log Z_i` over the streams summed raw.

    A nucleus row sums only its anchor raw; the others are normalised there already.
    """
    base = logits[0]
    assert base is not None, "the base runs in every step"
    raw = coef
    if rules is not None:
        others = ~_of_rule(rules.stream, coef.shape[1])
        apart = (rules.kind == float(RuleKind.NUCLEUS))[:, None]
        raw = coef.masked_fill(apart & others, 0.0)
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
        term = c * s
        if c.device.type != "cpu" or not c.all():  # elsewhere the host would have to wait
            term.masked_fill_(c == 0, 0.0)
        total = term if total is None else total.add_(term)
    assert total is not None, "no stream ran"
    return total.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER)


def _plausible(z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """Below all others what k does not find likely; on logits, so that no normaliser is needed."""
    s, rules = rows.chosen(), rows.rules
    floor = s.max(-1, keepdim=True).values + rules.param.log()[:, None]
    if rules.searched:
        place = how_many(rules.counts, s.shape[1])[:, None] - 1
        floor = torch.minimum(floor, s.sort(-1, descending=True).values.gather(1, place))
    least = z.masked_fill(z == NEVER, torch.inf).amin(-1, keepdim=True)
    back = SET_BACK + z.amax(-1, keepdim=True) - least
    return torch.where(s < floor, z - back, z)


def how_many(count: torch.Tensor, size: int) -> torch.Tensor:
    """[R] int64: `reference.how_many` of [R] float32 counts."""
    share = torch.where((count > 0) & (count < 1), count * size, count)
    return share.floor().clamp(1, size).long()


def _nucleus(_z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """`c_k s_k + Σ_{i≠k} c_i m log p_i`, m = 1 inside the top-p nucleus of stream k."""
    s = rows.chosen()
    inside = nucleus(s, rows.rules.param)
    anchor = _of_rule(rows.rules.stream, rows.coef.shape[1])
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


def _of_rule(stream: torch.Tensor, streams: int) -> torch.Tensor:
    """[R, S] bool: whether a stream is the one that the row's rule reads."""
    return stream.long()[:, None] == torch.arange(streams, device=stream.device)


def _select(z: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """The two sides of each row, the sum `z` and stream k, as its gate says."""
    s, rules, options = rows.chosen(), rows.rules, Options.of(rows.rules.options)
    ending = torch.zeros_like(z, dtype=torch.bool)
    if rules.ends is not None:
        ending = rules.ends.of(slice(None), z.shape[1])
    barred = ending & (options.ender == Ender.SUM)
    scale = z.logsumexp(-1, keepdim=True)
    opened, log_q, log_rest = _gate(z - scale, ending, rules, options)
    own = s.masked_fill(barred, NEVER).log_softmax(-1)
    hard = _only(z, s, own + scale, scale, barred, options.best)
    theirs = own + z.masked_fill(barred, NEVER).logsumexp(-1, keepdim=True)
    sign = 1 - 2 * (log_q > 0).float()  # above 1 the sum is subtracted
    soft = torch.where(barred, z, _log_add(log_q + theirs, log_rest + z, sign))
    if rules.shared:
        inside = shared(z, s, how_many(rules.counts, z.shape[1]))
        kept = torch.maximum(soft, scale + FLOOR)
        kept = torch.where(inside, kept, z - SET_BACK + FLOOR).masked_fill(z == NEVER, NEVER)
        soft = torch.where((rules.counts > 0)[:, None], kept, soft)
    return torch.where(opened, torch.where(options.hard, hard, soft), z)


def _gate(
    log_p: torch.Tensor, ending: torch.Tensor, rules: Rules, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[R, 1] each: whether it is open, log q, log |1 − q|; log_p is that of the sum."""
    param, head, doubt = rules.param[:, None], options.gate == Gate.HEAD, options.gate == Gate.DOUBT
    odds = torch.zeros_like(param) if rules.odds is None else rules.odds[:, None]
    top = log_p.amax(-1, keepdim=True).clamp(max=0.0)
    log = torch.nn.functional.logsigmoid
    log_q = torch.where(head, log(odds), torch.where(doubt, (-top.expm1()).log(), param.log()))
    rest = torch.where(doubt, top, (1 - param).abs().log())
    log_rest = torch.where(head, log(-odds), rest)
    always = ~options.hard & (param <= 0)
    opened = torch.where(doubt, top.exp() < param, ~head | (odds.sigmoid() > param) | always)
    others = log_p.masked_fill(ending, NEVER).amax(-1, keepdim=True)
    handed = (options.ender == Ender.STREAM) & (others < log_p.amax(-1, keepdim=True))
    return opened | handed, log_q, log_rest


def _only(
    z: torch.Tensor,
    s: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    barred: torch.Tensor,
    best: torch.Tensor,
) -> torch.Tensor:
    """A + log p_k where a hard gate is open: what is not k's to say is set back."""
    at = own.argmax(-1, keepdim=True)
    only = (own - SET_BACK).scatter(-1, at, own.gather(-1, at))
    only = torch.where(best, only, own)
    only = torch.where(barred, s.log_softmax(-1) + scale - 2 * SET_BACK, only)
    return torch.where(s == NEVER, z - 3 * SET_BACK, only)


def _log_add(x: torch.Tensor, y: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Log (eˣ + sign eʸ), −∞ where that is not positive."""
    top = torch.maximum(x, y)
    at = torch.where(top > NEVER, top, 0.0)
    return at + ((x - at).exp() + sign * (y - at).exp()).clamp(min=0.0).log()


def shared(one: torch.Tensor, other: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[R, V] bool: `reference.shared` of [R, V] scores each.

    An id is in both lists of n if its worse rank is below n, so the count-th least of these ranks
    says how long the lists are.
    """
    worse = torch.maximum(_ranks(one), _ranks(other))
    last = worse.sort(-1).values.gather(1, count[:, None] - 1)
    return worse <= last


def _ranks(s: torch.Tensor) -> torch.Tensor:
    """[R, V] int64 place of each id, the most likely one's 0; ties go to the lower id."""
    order = s.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(s.shape[1], device=s.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)
