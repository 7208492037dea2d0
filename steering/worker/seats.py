"""Seats: the plans of the requests in this step, as tables that the step reads.

Lives in the worker; one instance per steered model. A request gets its seat row when it is first
seen in a step and loses it when the batch changes without it; the row is written whole, so
nothing of an earlier request stays. While the same requests stay in the batch the tables are
reused as they are: no per-row Python in steady decode.

Letters: Q requests of this step, S streams (base first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from steering.plan import BASE, CRITICAL_KINDS, AdapterUse, RuleKind, Values
from steering.wire import Freight
from steering.worker.batches import Bool, Int32, OwnPrompts
from steering.worker.ends import Own
from steering.worker.layout import (
    ENDS,
    EXTRA,
    REQUEST,
    RULE_HEAD,
    RULE_KIND,
    RULE_PARAM,
    RULE_STREAM,
)


@dataclass(frozen=True, slots=True)
class Seat:
    """One request's plan, ready for the tables.

    Args:
        control: [S + EXTRA] float32, the row's control columns (report, ends and request left 0).
        uses: [S] which streams run.
        offsets: [S] by how many tokens each stream's prompt is shorter than the request's.
        prompts: per stream its own prompt, or None.
        tag: the report this request belongs to, '' for none.
        tokens: whether the report wants every token.
        adapters: the request's adapters.
        values: what value streams add, or None.
        heads: heads that the report tells.
        ends: ids that end its text beside the base's, if its rule or values ask.
    """

    control: npt.NDArray[np.float32]
    uses: npt.NDArray[np.bool_]
    offsets: Int32
    prompts: tuple[Int32 | None, ...]
    tag: str = ""
    tokens: bool = False
    adapters: tuple[AdapterUse, ...] = ()
    values: Values | None = None
    heads: tuple[str, ...] = ()
    ends: Own = ()


def seat(
    freight: Freight | None,
    prompt_len: int,
    streams: Sequence[str],
    heads: Sequence[str] = (),
    ends: Own = (),
) -> Seat:
    """The seat of a request.

    Args:
        freight: what the request carries; None for a plain request.
        prompt_len: tokens of the vLLM request's prompt, its padding included, without an earlier
            reply.
        streams: names of the streams that run, base first.
        heads: names of the classifier heads.
        ends: ids that end its text beside the base's.

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
    if freight is None:
        return Seat(control, uses, np.zeros(size, np.int32), tuple(prompts))
    index = {name: i for i, name in enumerate(streams)}
    plan = freight.plan
    control[0], uses[0] = 0.0, False
    for name in plan.bodies:
        uses[index[name]] = True
    for name, weight in plan.weights:
        control[index[name]] = weight
        uses[index[name]] = True
    control[size + RULE_KIND] = float(plan.rule.kind)
    control[size + RULE_STREAM] = index[plan.rule.stream] if plan.rule.kind else 0
    control[size + RULE_PARAM] = plan.rule.param
    if plan.rule.kind in CRITICAL_KINDS:
        control[size + RULE_HEAD] = heads.index(plan.rule.head)
    offsets = np.full(size, freight.pad, np.int32)
    for name, token_ids in plan.prompts:
        if name != BASE:
            prompts[index[name]] = np.asarray(token_ids, np.int32)
            offsets[index[name]] = prompt_len - len(token_ids)
    tokens = plan.report == "tokens"
    asks = plan.rule.kind in CRITICAL_KINDS or plan.values is not None
    return Seat(
        control,
        uses,
        offsets,
        tuple(prompts),
        freight.tag,
        tokens,
        plan.adapters,
        plan.values,
        plan.heads,
        ends if asks else (),
    )


@dataclass(slots=True)
class Tables:
    """The seats of this step's requests, in the step's order.

    Args:
        control: [Q, S + EXTRA] float32.
        uses: [Q, S] bool.
        offsets: [Q, S] int32.
        prompts: [S] the streams' own prompts, None for a stream without any.
        tagged: (row, seat) of requests that report.
        steered: whether any row leaves the base's path or reports.
        special: whether any row has a rule other than the plain sum, or values.
        adapters: [Q] the requests' adapters.
        valued: (row, values) of requests that value streams add to.
        whole: [S] streams that run exactly what vLLM scheduled: every row, from its first token.
        like: [S] the first stream that runs the same tokens at the same positions.
        even: whether every row sums the same streams, the base and more.
        ends: the sets of ids that end a text, beside the base's; the first is empty.
    """

    control: npt.NDArray[np.float32]
    uses: npt.NDArray[np.bool_]
    offsets: Int32
    prompts: tuple[OwnPrompts | None, ...]
    tagged: list[tuple[int, Seat]]
    steered: bool
    special: bool
    adapters: list[tuple[AdapterUse, ...]]
    valued: list[tuple[int, Values]]
    whole: tuple[bool, ...]
    like: tuple[int, ...]
    even: bool
    ends: tuple[Own, ...]

    def ends_of(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """[n] which of `ends` some rows have."""
        return self.control[list(rows), self.uses.shape[1] + ENDS]


def tables(seats: Sequence[Seat], streams: int, always: bool = False) -> Tables:
    """Stacks seats into tables.

    Args:
        seats: [Q] of this step's requests.
        streams: S.
        always: whether the base runs every row, wanted or not: its layers keep a state.

    Raises:
        ValueError: the base shall lag behind a request although it always runs.
    """
    control = np.stack([s.control for s in seats])
    uses = np.stack([s.uses for s in seats])
    offsets = np.stack([s.offsets for s in seats])
    tagged = [(row, s) for row, s in enumerate(seats) if s.tag]
    valued = [(row, s.values) for row, s in enumerate(seats) if s.values is not None]
    special = bool((control[:, streams + RULE_KIND] != RuleKind.SUM).any() or valued)
    plain = np.zeros(streams + EXTRA, np.float32)
    plain[0] = 1.0
    steered = bool((control != plain).any() or offsets.any() or tagged or valued)
    sets: dict[Own, int] = {(): 0}
    control[:, streams + ENDS] = [sets.setdefault(s.ends, len(sets)) for s in seats]
    control[:, streams + REQUEST] = np.arange(len(seats)) + 1
    prompts = tuple(OwnPrompts.of([s.prompts[i] for s in seats]) for i in range(streams))
    adapters = [s.adapters for s in seats]
    own = np.array([p is not None for p in prompts])
    lags: Bool = np.any(offsets, axis=0)
    whole = uses.all(0) & ~lags & ~own
    if always:
        if lags[0]:
            raise ValueError("a base that keeps a state cannot lag behind its request")
        whole[0] = True
    return Tables(
        control,
        uses,
        offsets,
        prompts,
        tagged,
        steered,
        special,
        adapters,
        valued,
        tuple(whole.tolist()),
        _like(uses, offsets, own),
        not special and _even(control[:, :streams], uses),
        tuple(sets),
    )


def _like(uses: Bool, offsets: Int32, own: Bool) -> tuple[int, ...]:
    first: dict[object, int] = {}
    found = []
    for i in range(own.size):
        alone = i if own[i] else -1
        key = uses[:, i].tobytes(), offsets[:, i].tobytes(), alone
        found.append(first.setdefault(key, i))
    return tuple(found)


def _even(coef: npt.NDArray[np.float32], uses: Bool) -> bool:
    return bool(((coef != 0) == uses[0]).all() and uses[0, 0] and uses[0, 1:].any())


SeatLoader = Callable[[str], tuple[Freight | None, int, Iterable[int]]]
"""Request id → (its freight, its prompt length in tokens, its own stop ids)."""


@dataclass
class SeatBook:
    """Keeps the tables of the current batch.

    Args:
        streams: names of the streams that run, base first.
        heads: names of the classifier heads.
        own: what stop ids add to those at which the base ends a text.
        always: see `tables`.
    """

    streams: tuple[str, ...]
    heads: tuple[str, ...] = ()
    own: Callable[[Iterable[int]], Own] = tuple
    always: bool = False
    _seats: dict[str, Seat] = field(default_factory=dict)
    _ids: list[str] = field(default_factory=list)
    _tables: Tables | None = None

    def update(self, ids: list[str], load: SeatLoader) -> Tables:
        """The tables for a step that runs requests `ids`, in that order.

        Args:
            ids: request ids, in batch order.
            load: tells of a request when it is new to the batch.
        """
        if self._tables is not None and ids == self._ids:
            return self._tables
        self._seats = {i: self._seats.get(i) or self._seat(*load(i)) for i in ids}
        self._ids = list(ids)
        self._tables = tables([self._seats[i] for i in ids], len(self.streams), self.always)
        return self._tables

    def _seat(self, freight: Freight | None, prompt_len: int, stops: Iterable[int]) -> Seat:
        return seat(freight, prompt_len, self.streams, self.heads, self.own(stops))
