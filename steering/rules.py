"""The rules of the read-out: how streams are put together, and which ids count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from steering.errors import BadValue

BASE = "base"


class RuleKind(IntEnum):
    """The core operations of the read-out: how streams are put together, and which ids count. New
    arithmetic is a change to this list.
    """

    SUM = 0
    """`z = Σ_i c_i s_i`."""

    PLAUSIBLE = 1
    """`SUM`, with ids set back, below all others, unless stream k = `Rule.stream` finds them
    likely: `p_k(v) ≥ param · max p_k`, or no more than `count` − 1 ids have a larger p_k. With
    count 1 this is contrastive decoding's constraint (arXiv 2210.15097, eq. 2, which has −∞ there),
    with param 1 a top-k mask. `steering.kernels.reference` says how far ids are set back."""

    NUCLEUS = 2
    """`z = c_k s_k + Σ_{i≠k} c_i m log p_i`, with m = 1 inside the top-p nucleus of stream
    k = `Rule.stream` (p = param) and 0 outside (the delta filter of emulated fine-tuning).
    The delta is log-softmaxed first: a masked raw delta would lose a constant shift."""

    SELECT = 3
    """Two sides, the sum without stream k = `Rule.stream`, and k. With
    p_a = softmax(Σ_{i≠k} c_i s_i) and a gate's number q (`Gate`):

        soft    p = (1 − q) p_a + q p_k
        hard    p_k where the gate is open, else p_a

    `Rule.ender` says who may end the text, `Rule.best` whether k gives its most likely id only, and
    `Rule.count` which ids count: of the shared ones of both sides' top lists (arXiv 2402.08983)."""


class Gate(IntEnum):
    """What says how much of a token is stream k's: q, and where it is open."""

    CONSTANT = 0
    """q = param; always open. Above 1 only with `Rule.count`: p_a is subtracted."""

    HEAD = 1
    """q is the probability that the classifier head `Rule.head` gives; open where q > param."""

    DOUBT = 2
    """q = 1 − max p_a; open where max p_a < param: the sum is not sure of itself."""


class Ender(IntEnum):
    """Who may end the text in a `SELECT`, by one of E, the ids that end it."""

    EITHER = 0
    """No id is special."""

    SUM = 1
    """k cannot: p_k counts as p_k(· | not E), and E keeps what p_a gives it. Hard: on E nothing."""

    STREAM = 2
    """Hard only. Where one of E is the most likely id of p_a, k decides: the gate is open."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A core operation with its arguments.

    Args:
        kind: which operation.
        stream: the stream it reads (k above); ignored by `SUM`.
        param: α in (0, 1] for `PLAUSIBLE`, p in (0, 1] for `NUCLEUS`, what the gate says for
            `SELECT`: in [0, 1], or above for a constant with a count. A soft `SELECT` by a head
            with param 0 is always open.
        head: the classifier head of `Gate.HEAD`; '' for others.
        count: `PLAUSIBLE`: ids that are plausible in any case; below 1 a share of the base's table,
            0 as 1. `SELECT`: how many ids both top lists share; 0: all ids count.
        gate: of `SELECT`.
        hard: of `SELECT`.
        ender: of `SELECT`.
        best: a hard `SELECT` takes only k's most likely id, of equals the lowest.
    """

    kind: RuleKind = RuleKind.SUM
    stream: str = BASE
    param: float = 0.0
    head: str = ""
    count: float = 0.0
    gate: Gate = Gate.CONSTANT
    hard: bool = False
    ender: Ender = Ender.EITHER
    best: bool = False

    @property
    def options(self) -> int:
        """The last four as one number for the device: `steering.kernels.mix.Options` reads it."""
        return int(self.gate) + 4 * self.hard + 8 * int(self.ender) + 32 * self.best

    @property
    def reads_head(self) -> bool:
        """Whether a classifier head says something in it."""
        return self.kind is RuleKind.SELECT and self.gate is Gate.HEAD

    @property
    def sets_back(self) -> bool:
        """Whether it keeps ids from being drawn by setting them back."""
        select = self.kind is RuleKind.SELECT and (self.hard or self.count > 0)
        return select or self.kind is RuleKind.PLAUSIBLE


def checked_rule(rule: Rule, weights: tuple[tuple[str, float], ...], field: str) -> Rule:
    """A recipe's rule, if its parts go together.

    Args:
        rule: as a method wrote it.
        weights: (stream, c_i) of the recipe.
        field: where the steering object stands, for errors.

    Raises:
        BadValue: they do not.
    """
    if rule.kind is RuleKind.SUM:
        return Rule()  # SUM reads no arguments: equal plans must be equal
    if rule.stream not in dict(weights):
        raise BadValue(f"the rule reads the stream {rule.stream}, which has no weight", field=field)
    zero = 0 if rule.kind is RuleKind.SELECT and rule.gate else math.ulp(0.0)
    most = math.inf if rule.kind is RuleKind.SELECT and rule.count else 1
    if not (zero <= rule.param <= most and math.isfinite(rule.param)):
        raise BadValue("the rule's share is out of range", field=field, value=rule.param)
    if not (0 <= rule.count < 1 or float(rule.count).is_integer()):
        raise BadValue("the rule's count is out of range", field=field, value=rule.count)
    if rule.kind is RuleKind.SELECT:
        _check_select(rule, weights, field)
    return rule


def _check_select(rule: Rule, weights: tuple[tuple[str, float], ...], field: str) -> None:
    """Raises BadValue unless the parts of a `SELECT` go together."""
    constant, whole = rule.gate is Gate.CONSTANT, rule.ender is Ender.EITHER
    if not any(c for stream, c in weights if stream != rule.stream):
        raise BadValue(f"the rule has no stream to sum beside {rule.stream}", field=field)
    if rule.hard and constant:
        raise BadValue("a hard rule needs a gate that opens and closes", field=field)
    if not rule.hard and (rule.best or rule.ender is Ender.STREAM):
        raise BadValue("a soft rule takes all of a stream's ids", field=field)
    if rule.count and not (constant and whole and rule.count >= 1):
        raise BadValue("a rule with a count of shared ids has a constant share", field=field)
