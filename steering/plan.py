"""The plan: what one request does to the read-out sum. Frozen in the front end, read in the worker.

Notation (DESIGN.md section 1): stream 0 is `base`; `z = Σ_i c_i s_i` with `s_i` a stream's raw
logits over the vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

from adapters.where import Text, Where
from steering.rules import BASE as BASE
from steering.rules import Ender as Ender
from steering.rules import Gate as Gate
from steering.rules import Rule as Rule
from steering.rules import RuleKind as RuleKind
from steering.search import Proposal, Search

SUM = Rule()

Report = Literal["off", "summary", "tokens"]


class LayerKind(IntEnum):
    """What a rule does with taps: streams that read out a layer of the base before its last."""

    NONE = 0
    """Nothing."""

    CONTRAST = 1
    """The sum, with only one of the streams that have a negative coefficient: the one that differs
    most from the base (DoLa, arXiv 2309.03883). The distributions are log-softmaxed first. How far
    p and p_j differ is `½ (KL(M ‖ p) + KL(M ‖ p_j))`, M their mean, as the authors' code has it."""

    CONTRAST_JSD = 2
    """The same by the Jensen-Shannon divergence, `½ (KL(p ‖ M) + KL(p_j ‖ M))`, as the paper."""

    EVOLVE = 3
    """The base's scores, moved towards what the layers' change points at (SLED, arXiv 2411.02433);
    `steering.kernels.reference.evolved` is the definition."""


@dataclass(frozen=True, slots=True)
class LayerRule:
    """A rule over layers; its taps are the streams of the sum with a negative coefficient.

    Args:
        kind: which.
        rate: of `EVOLVE`, > 0.
        top_k: ids that `EVOLVE` keeps, ≥ 1.
    """

    kind: LayerKind
    rate: float = 0.0
    top_k: int = 0


EndValue = Literal["prefix", "zero", "model"]

Transform = Literal["identity", "log_sigmoid", "clip"]


@dataclass(frozen=True, slots=True)
class Values:
    """`Σ_m β_m (V_m(s⊕j) − mean_j V_m(s⊕j))` on the base's `top_k` most likely ids j.

    Value-augmented sampling (arXiv 2405.06639). The other ids are left as they are. A value
    model is not trained on V(s⊕j) of an id that ends the text; `ends` says what stands for it:
    'prefix' V(s), 'zero' no addition (and no part in the mean), 'model' what the model says.

    Args:
        strengths: (value stream, β), by name, no zeros.
        top_k: candidates, ≥ 1.
        ends: the rule for ids that end the text.
        mask: whether all other ids are set back below the candidates.
        centre: whether the mean is taken off.
        transform: what is made of each value before: log σ(V), or V clipped to [0, 1].
    """

    strengths: tuple[tuple[str, float], ...]
    top_k: int
    ends: EndValue = "prefix"
    mask: bool = False
    centre: bool = True
    transform: Transform = "identity"


@dataclass(frozen=True, slots=True)
class Best:
    """Draws `n` replies by the rest of the plan; the one with the head's highest number is kept.

    Args:
        head: its number after the whole reply decides; the largest wins, of equals the first.
        n: replies, ≥ 1.
        body: the stream whose hidden state the head reads; filled in when it is resolved.
    """

    head: str
    n: int
    body: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Some of a reply's tokens: those to which all of this applies.

    Args:
        start: the first one, 0-based.
        stop: the first one behind them; None: none.
        after: the text behind whose first place in the reply they come.
        until: the text in front of whose end they come, or that is not there yet.
    """

    start: int = 0
    stop: int | None = None
    after: Text | None = None
    until: Text | None = None


@dataclass(frozen=True, slots=True)
class RecipePhase:
    """What holds for some of a reply's tokens; as in `Recipe`."""

    span: Span
    weights: dict[str, float]
    rule: Rule = SUM
    values: Values | None = None
    layers: LayerRule | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The result of a method: the weights of the sum, and the rule.

    Args:
        weights: stream name → coefficient c_i. A stream that is left out has c_i = 0; `base`
            left out means c_0 = 0.
        rule: how the streams are combined.
        values: what value streams add to that; None: nothing.
        best: how one of several replies is chosen; None: one is drawn.
        search: how the reply grows block by block; None: it is drawn as a whole.
        layers: what happens to taps before the rule; None: they are streams like others.
        phases: what holds for some of the reply's tokens instead; of several, the last.
    """

    weights: dict[str, float]
    rule: Rule = SUM
    values: Values | None = None
    best: Best | None = None
    search: Search | None = None
    layers: LayerRule | None = None
    phases: tuple[RecipePhase, ...] = ()


@dataclass(frozen=True, slots=True)
class Phase:
    """A `RecipePhase`, resolved: weights as in `SteeringPlan`."""

    span: Span
    weights: tuple[tuple[str, float], ...]
    rule: Rule = SUM
    values: Values | None = None
    layers: LayerRule | None = None


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter in a request: what it is multiplied by in one stream's adapter sum.

    Args:
        digest: of the adapter's content.
        stream: the stream whose layers it changes.
        weight: g of a LoRA adapter, finite; multiplies the whole of a MeteoRA pack.
        top_k: members of a pack that each token is routed to, 1 to its members; 0 for a LoRA.
        temperature: T > 0 of a pack's softmax; 1 for a LoRA.
        where: at which positions of the stream's text it acts: one for all of its members, or one
            for each; empty: at all.
        reads_prompt: whether states of the prompt decide if it acts: cached blocks have none.
        invocation: ids of the base from whose last occurrence in the prompt it acts (aLoRA); once
            the prompt is known, `where` says where that is. Empty: it is none.
    """

    digest: str
    stream: str = BASE
    weight: float = 1.0
    top_k: int = 0
    temperature: float = 1.0
    where: tuple[Where, ...] = ()
    reads_prompt: bool = False
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SteeringPlan:
    """One request's steering, resolved: names are checked, numbers are in range.

    Args:
        method: the method's name, for reports and metrics.
        weights: (stream, c_i), base first, then by name; no zero weights except base's. None at
            all: the request is only read, by `heads`, and the base does not run for the sum.
        rule: the core operation.
        prompts: (stream, token ids) for streams that read a prompt of their own; ids of that
            stream's own tokenizer.
        report: what to measure while decoding.
        bodies: streams that run for a head or a tap on them; sorted.
        values: what value streams add to the scores; None: nothing.
        adapters: what the adapter sums add, sorted, at most one use per stream and digest.
            The request's LoRARequest must hold all of them (`adapters.sets.AdapterSet`).
        heads: heads whose number the report gives where a token is drawn; their bodies run.
        best: how one of several replies is chosen; None: one is drawn. The front end's affair:
            the worker sees `drawing` and `scoring`.
        search: how the reply grows block by block; None: it is drawn as a whole. The front end's
            affair: the worker sees `proposing` and `reading`.
        likelihoods: streams whose log-probabilities of the drawn tokens the report adds up, at
            temperature 1, over the ids that they share with the base; they run.
        layers: what happens to taps before the rule; None: they are streams like others.
        taps: the streams of the sum that run nothing: each reads out another stream's layer.
        phases: what holds for some of the reply's tokens instead of `weights`, `rule`, `values` and
            `layers`; of several, the last. Prompts' tokens are of no phase.
    """

    method: str
    weights: tuple[tuple[str, float], ...] = ((BASE, 1.0),)
    rule: Rule = SUM
    prompts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    report: Report = "off"
    adapters: tuple[AdapterUse, ...] = ()
    bodies: tuple[str, ...] = ()
    values: Values | None = None
    heads: tuple[str, ...] = ()
    best: Best | None = None
    search: Search | None = None
    likelihoods: tuple[str, ...] = ()
    layers: LayerRule | None = None
    taps: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that hold somewhere in the reply."""
        return (self.rule, *(phase.rule for phase in self.phases))

    @property
    def valued(self) -> tuple[Values, ...]:
        """What value streams add somewhere in the reply."""
        found = (self.values, *(phase.values for phase in self.phases))
        return tuple(values for values in found if values is not None)

    @property
    def layered(self) -> tuple[LayerRule, ...]:
        """The rules over layers that hold somewhere in the reply."""
        found = (self.layers, *(phase.layers for phase in self.phases))
        return tuple(rule for rule in found if rule is not None)

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """(stream, c_i) of every sum that holds somewhere in the reply."""
        return (*self.weights, *(term for phase in self.phases for term in phase.weights))

    @property
    def summed(self) -> tuple[str, ...]:
        """The streams of the sum in any phase, base first, then by name."""
        return tuple(sorted({n for n, _ in self.terms}, key=lambda name: (name != BASE, name)))

    @property
    def streams(self) -> tuple[str, ...]:
        """The companion streams that must run: those of the sum, then those that are read."""
        found = [*self.summed, *self.bodies, *self.likelihoods]
        if self.best is not None:
            found.append(self.best.body)
        if self.search is not None:
            found += self.search.streams
        return tuple(name for name in dict.fromkeys(found) if name not in (BASE, *self.taps))

    @property
    def runs_base(self) -> bool:
        """Whether the base runs: for the sum, for a head on it, or for its log-probabilities."""
        return BASE in (*self.summed, *self.bodies, *self.likelihoods)

    @property
    def drawing(self) -> SteeringPlan:
        """The plan for drawing each of the replies."""
        return replace(self, best=None)._with_prompts_of(self)

    def proposing(self, proposal: Proposal) -> SteeringPlan:
        """What each block of a proposal is drawn with.

        Reports of every token have the base's log-probabilities: then it runs, if it would not.
        """
        likelihoods = proposal.score.ratio if proposal.score else ()
        quiet: Report = "summary" if likelihoods else "off"
        plan = replace(
            self,
            weights=proposal.weights,
            search=None,
            likelihoods=likelihoods,
            report=quiet if self.report == "off" else self.report,
        )
        if self.report == "tokens" and not plan.runs_base:
            plan = replace(plan, bodies=(BASE,))
        return plan._with_prompts_of(self)

    def _with_prompts_of(self, whole: SteeringPlan) -> SteeringPlan:
        return replace(self, prompts=tuple(p for p in whole.prompts if p[0] in self.streams))

    @property
    def scoring(self) -> SteeringPlan:
        """The plan for reading a reply, as the end of a prompt."""
        assert self.best is not None
        return self.reading(self.best.head, self.best.body)

    def reading(self, head: str, body: str) -> SteeringPlan:
        """What a head reads a reply with, as the end of a prompt.

        Args:
            head: its name.
            body: the stream whose hidden state it reads.
        """
        return SteeringPlan(
            self.method,
            (),
            prompts=tuple(p for p in self.prompts if p[0] == body),
            report="summary",
            adapters=self.adapters,
            bodies=(body,),
            heads=(head,),
        )

    @property
    def steers(self) -> bool:
        """False if the read-out takes the base's own path, bit for bit; adapters or not."""
        alone = self.weights == ((BASE, 1.0),) and self.rule.kind is RuleKind.SUM
        chosen = self.best is not None or self.search is not None
        return not alone or self.values is not None or chosen or bool(self.phases)

    def cache_key(self, pad: int) -> str:
        """Names the prefix cache this request may share: '' for the base's own.

        A stream's KV is valid for a later request only if that request runs the same streams,
        each with the same prompt at the same offset and the same adapters at the same weights.
        The read-out's coefficients do not matter: KV does not depend on them.

        Args:
            pad: how many tokens the request's prompt was lengthened by (`steering.prompts.align`).
        """
        if not self.streams and not pad and not self.adapters:
            return ""
        prompts = tuple(p for p in self.prompts if p[0] in self.streams)
        state: tuple[object, ...] = (self.streams, prompts, pad)
        if self.adapters:
            state += (self.adapters,)
        if not self.runs_base:
            state += ("no base",)
        return hashlib.sha256(repr(state).encode()).hexdigest()[:32]


BARE = SteeringPlan(BASE)
"""The base alone: what a request has that names adapters, or a report, and no method."""
