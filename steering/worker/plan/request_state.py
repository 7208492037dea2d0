"""Per-request state in the worker: each request's plan as numbers, stacked for the step's batch.

One `RequestStates` per steered model. A request is added before its first step and removed after
its last; its state never changes, and nothing of it stays. While the same requests stay in the
batch the tables are reused as they are: no per-request Python in steady decode.

Letters: Q requests of this step, S streams (base first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

import numpy as np
import numpy.typing as npt

from adapters.where import Text
from steering.plan import BASE, AdapterUse, Gate, Phase, RuleKind, SteeringPlan, Values
from steering.wire import SteeringPayload
from steering.worker.plan.batches import Bool, Int32, Int64, OwnPrompts, Schedule
from steering.worker.plan.ends import Own
from steering.worker.plan.layout import (
    CANDIDATES_ONLY,
    ENDS,
    EXTRA,
    LAYERS,
    LAYERS_RATE,
    LAYERS_TOP_K,
    RULE_COUNT,
    RULE_HEAD,
    RULE_KIND,
    RULE_OPTIONS,
    RULE_PARAM,
    RULE_STREAM,
)
from steering.worker.plan.phases import FAR, PhaseLine, PhaseTables
from steering.worker.plan.texts import AdapterTexts


@dataclass(frozen=True, slots=True)
class RequestState:
    """One request's plan, ready for the tables.

    Args:
        control: [S + EXTRA] float32, the row's control columns (ends left 0).
        uses: [S] which streams run.
        offsets: [S] by how many tokens each stream's prompt is shorter than the request's.
        prompts: per stream its own prompt, or None.
        tag: the report this request belongs to, '' for none.
        tokens: whether the report wants every token.
        adapters: the request's adapters.
        values: what value streams add: where no phase holds, then in each phase; () for nothing in
            any of them.
        heads: heads whose numbers the report has.
        ends: ids that end its text beside the base's, if its rule or values ask.
        prompt: tokens of its prompt, padding included, without an earlier reply.
        likelihoods: indices of streams whose log-probabilities of drawn tokens the report has.
        phases: what holds for some of its reply's tokens.
    """

    control: npt.NDArray[np.float32]
    uses: npt.NDArray[np.bool_]
    offsets: Int32
    prompts: tuple[Int32 | None, ...]
    tag: str = ""
    tokens: bool = False
    adapters: tuple[AdapterUse, ...] = ()
    values: tuple[Values | None, ...] = ()
    heads: tuple[str, ...] = ()
    ends: Own = ()
    prompt: int = 0
    likelihoods: tuple[int, ...] = ()
    phases: tuple[PhaseLine, ...] = ()

    @property
    def gated(self) -> tuple[bool, float] | None:
        """(whether the gate is hard, its threshold) if the rule reads a classifier head; None for
        others, and for a request whose rule differs between phases.
        """
        extra = self.control[self.uses.size :]
        options = int(extra[RULE_OPTIONS])
        if self.phases or extra[RULE_KIND] != RuleKind.SELECT or options & 3 != Gate.HEAD:
            return None
        return bool(options & 4), float(extra[RULE_PARAM])

    def alone(self, i: int) -> bool:
        """Whether a report has what stream i by itself would choose. Which streams a row sums that
        has phases is not known here.
        """
        return self.tokens and not self.phases and bool(self.control[i] != 0)


def request_state(
    payload: SteeringPayload | None,
    prompt_len: int,
    streams: Sequence[str],
    heads: Sequence[str] = (),
    ends: Own = (),
    taps: Mapping[str, str] = MappingProxyType({}),
) -> RequestState:
    """The state of a request.

    Args:
        payload: what the request carries; None for a plain request.
        prompt_len: tokens of the vLLM request's prompt, its padding included, without an earlier
            reply.
        streams: names of the streams, base first.
        heads: names of the classifier heads.
        ends: ids that end its text beside the base's.
        taps: tap → the stream of which it reads a layer.

    Raises:
        KeyError, ValueError: the plan names a stream or a head that this model lacks (the front
            end checks names).
    """
    size = len(streams)
    control = np.zeros(size + EXTRA, np.float32)
    control[0] = 1.0
    uses = np.zeros(size, np.bool_)
    uses[0] = True
    prompts: list[Int32 | None] = [None] * size
    if payload is None:
        return RequestState(
            control, uses, np.zeros(size, np.int32), tuple(prompts), prompt=prompt_len
        )
    index = {name: i for i, name in enumerate(streams)}
    plan = payload.plan
    control[0], uses[0] = 0.0, False
    for name in (*plan.bodies, *plan.likelihoods):
        uses[index[name]] = True
    for name in plan.summed:
        # What a tap reads must run, and what it kept must be taken.
        uses[index[name]] = uses[index[taps.get(name, name)]] = True
    _write(control, plan, index, heads)
    offsets = np.full(size, payload.pad, np.int32)
    for name, token_ids in plan.prompts:
        if name != BASE:
            prompts[index[name]] = np.asarray(token_ids, np.int32)
            offsets[index[name]] = prompt_len - len(token_ids)
    for name in plan.taps:
        offsets[index[name]] = offsets[index[taps[name]]]
    tokens = plan.report == "tokens"
    asks = any(r.kind is RuleKind.SELECT for r in plan.rules) or bool(plan.valued)
    return RequestState(
        control,
        uses,
        offsets,
        tuple(prompts),
        payload.tag,
        tokens,
        plan.adapters,
        (plan.values, *(phase.values for phase in plan.phases)) if plan.valued else (),
        plan.heads,
        ends if asks else (),
        prompt_len,
        tuple(index[name] for name in plan.likelihoods),
        tuple(_phase(phase, index, heads) for phase in plan.phases),
    )


def _phase(phase: Phase, index: Mapping[str, int], heads: Sequence[str]) -> PhaseLine:
    control, span = np.zeros(len(index) + EXTRA, np.float32), phase.span
    _write(control, phase, index, heads)
    stop = FAR if span.stop is None else span.stop
    return PhaseLine(control, span.start, stop, _ids(span.after), _ids(span.until))


def _ids(text: Text | None) -> tuple[int, ...]:
    if text is not None and not text.ids:
        raise ValueError(f"the tokens of a phase's text are missing: {text.text!r}")
    return () if text is None else text.ids


def _write(
    control: npt.NDArray[np.float32],
    part: SteeringPlan | Phase,
    index: Mapping[str, int],
    heads: Sequence[str],
) -> None:
    """Writes coefficients and rules into a line of control, [S + EXTRA]."""
    for name, weight in part.weights:
        control[index[name]] = weight
    extra, rule = control[len(index) :], part.rule
    extra[RULE_KIND] = float(rule.kind)
    extra[RULE_STREAM] = index[rule.stream] if rule.kind else 0
    # What is not 0 must not become 0: a nucleus of probability 0 has nothing in it.
    extra[RULE_PARAM] = max(rule.param, float(np.finfo(np.float32).tiny)) if rule.param else 0.0
    extra[RULE_COUNT] = rule.count
    masked = part.values is not None and part.values.mask
    extra[RULE_OPTIONS] = rule.options + masked * CANDIDATES_ONLY
    if rule.reads_head:
        extra[RULE_HEAD] = heads.index(rule.head)
    if part.layers is not None:
        extra[LAYERS], extra[LAYERS_RATE] = float(part.layers.kind), part.layers.rate
        extra[LAYERS_TOP_K] = part.layers.top_k


@dataclass(frozen=True, slots=True)
class BatchTables:
    """The states of this step's requests, in the step's order.

    Args:
        control: [Q, S + EXTRA] float32.
        uses: [Q, S] bool.
        offsets: [Q, S] int32.
        prompts: [S] the streams' own prompts, None for a stream without any.
        adapters: [Q] the requests' adapters.
        lengths: [Q] tokens of their prompts, padding included.
        reported: (row, state) of requests that report.
        values: what value streams add, for each line of control: of each request where no phase
            holds, then of the phases, as in `PhaseTables.lines`; () if nothing to any.
        valued: [n] requests that they add to in any phase.
        ends: the sets of ids that end a text, beside the base's; the first is empty.
        steered: whether any row leaves the base's path or reports.
        has_rules: whether any row has a rule other than the plain sum, or values.
        uniform_sum: whether every row sums the same streams, the base and more.
        full_batch: [S] streams that run exactly what vLLM scheduled: every row, from its first
            token.
        shares_batch_with: [S] the first stream that runs the same tokens at the same positions.
        phases: of requests that have any; None: none has.
        texts: that bound where adapters act; None: none do.
    """

    control: npt.NDArray[np.float32]
    uses: Bool
    offsets: Int32
    prompts: tuple[OwnPrompts | None, ...]
    adapters: tuple[tuple[AdapterUse, ...], ...]
    lengths: Int64
    reported: tuple[tuple[int, RequestState], ...]
    values: tuple[Values | None, ...]
    valued: Int64
    ends: tuple[Own, ...]
    steered: bool
    has_rules: bool
    uniform_sum: bool
    full_batch: tuple[bool, ...]
    shares_batch_with: tuple[int, ...]
    phases: PhaseTables | None = None
    texts: AdapterTexts | None = None

    @classmethod
    def of(cls, states: Sequence[RequestState], always: bool = False) -> Self:
        """Stacks the states of a batch.

        Args:
            states: [Q] of this step's requests, Q ≥ 1.
            always: whether the base runs every row, used or not: its layers keep a state.

        Raises:
            ValueError: the base shall lag behind a request although it always runs.
        """
        control = np.stack([s.control for s in states])
        uses = np.stack([s.uses for s in states])
        offsets = np.stack([s.offsets for s in states])
        streams = uses.shape[1]
        reported = tuple((row, s) for row, s in enumerate(states) if s.tag)
        values = [s.values or (None,) * (1 + len(s.phases)) for s in states]
        first, more = [own[0] for own in values], [one for own in values for one in own[1:]]
        valued = np.flatnonzero([bool(s.values) for s in states])
        plain = np.zeros(streams + EXTRA, np.float32)
        plain[0] = 1.0
        steered = bool((control != plain).any() or offsets.any() or reported or valued.size)
        sets: dict[Own, int] = {(): 0}
        control[:, streams + ENDS] = [sets.setdefault(s.ends, len(sets)) for s in states]
        phases = PhaseTables.of(
            control, [s.phases for s in states], [s.prompt for s in states], streams + ENDS
        )
        lines = control if phases is None else phases.lines
        has_rules = bool(lines[:, [streams + RULE_KIND, streams + LAYERS]].any() or valued.size)
        prompts = tuple(OwnPrompts.of([s.prompts[i] for s in states]) for i in range(streams))
        own = np.array([p is not None for p in prompts])
        lags: Bool = np.any(offsets, axis=0)
        full = uses.all(0) & ~lags & ~own
        if always:
            if lags[0]:
                raise ValueError("a base that keeps a state cannot lag behind its request")
            full[0] = True
        return cls(
            control=control,
            uses=uses,
            offsets=offsets,
            prompts=prompts,
            adapters=tuple(s.adapters for s in states),
            lengths=np.array([s.prompt for s in states], np.int64),
            reported=reported,
            values=(*first, *more) if valued.size else (),
            valued=valued,
            ends=tuple(sets),
            steered=steered or phases is not None,
            has_rules=has_rules,
            uniform_sum=not has_rules and phases is None and _uniform(control[:, :streams], uses),
            full_batch=tuple(full.tolist()),
            shares_batch_with=_sharing(uses, offsets, own),
            phases=phases,
            texts=AdapterTexts.of([s.adapters for s in states]),
        )

    def may_hold(self, schedule: Schedule) -> Bool:
        """[N] which lines of control may hold for a token that a step draws."""
        if self.phases is None:
            return np.ones(len(self.control), np.bool_)
        return self.phases.may_hold(schedule)

    def ends_of(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """[n] which of `ends` some rows have."""
        return self.control[list(rows), self.uses.shape[1] + ENDS]


def _sharing(uses: Bool, offsets: Int32, own: Bool) -> tuple[int, ...]:
    first: dict[object, int] = {}
    sharing = []
    for i in range(own.size):
        alone = i if own[i] else -1
        key = uses[:, i].tobytes(), offsets[:, i].tobytes(), alone
        sharing.append(first.setdefault(key, i))
    return tuple(sharing)


def _uniform(coef: npt.NDArray[np.float32], uses: Bool) -> bool:
    return bool(((coef != 0) == uses[0]).all() and uses[0, 0] and uses[0, 1:].any())


@dataclass
class RequestStates:
    """The states of the requests that vLLM's runner holds, and the tables of its current batch.

    Args:
        streams: names of the streams, base first.
        heads: names of the classifier heads.
        own: what stop ids add to those at which the base ends a text.
        always: see `BatchTables.of`.
        taps: tap → the stream of which it reads a layer.
    """

    streams: tuple[str, ...]
    heads: tuple[str, ...] = ()
    own: Callable[[Iterable[int]], Own] = tuple
    always: bool = False
    taps: Mapping[str, str] = field(default_factory=dict)
    _states: dict[str, RequestState] = field(default_factory=dict)
    _ids: tuple[str, ...] = ()
    _tables: BatchTables | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def add_request(
        self,
        request_id: str,
        payload: SteeringPayload | None,
        prompt_len: int,
        stops: Iterable[int],
    ) -> None:
        """Takes a request in, in place of one of the same id.

        Args:
            request_id: vLLM's id.
            payload: what it carries; None for a plain request.
            prompt_len: tokens of the vLLM request's prompt, padding and an earlier reply included.
            stops: ids at which it stops.

        Raises:
            KeyError, ValueError: as `request_state`.
        """
        length = prompt_len - (payload.reply if payload else 0)
        own = self.own(stops)
        self._states[request_id] = request_state(
            payload, length, self.streams, self.heads, own, self.taps
        )
        self._tables = None

    def remove_request(self, request_id: str) -> None:
        """Forgets a request."""
        self._states.pop(request_id, None)
        self._tables = None

    def apply(self, request_ids: Sequence[str]) -> BatchTables:
        """The tables of a step that runs these requests, in that order.

        Raises:
            KeyError: one was not added.
        """
        ids = tuple(request_ids)
        if self._tables is None or ids != self._ids:
            self._tables = BatchTables.of([self._states[i] for i in ids], self.always)
            self._ids = ids
        return self._tables
