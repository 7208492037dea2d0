"""The plan of one step: everything about it that is known on the host before it runs.

`plan_step` is a pure function of what vLLM scheduled and of the requests' states. What runs the
step, reads it out and reports reads the plan, so nothing of that has to ask the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple, Self

import numpy as np

from steering.plan import Gate, LayerKind, RuleKind, Values
from steering.worker.plan.batches import Schedule, StreamBatch, stream_batch
from steering.worker.plan.layout import LAYERS, RULE_COUNT, RULE_HEAD, RULE_KIND, RULE_OPTIONS
from steering.worker.plan.request_state import BatchTables


@dataclass(frozen=True, slots=True)
class Classes:
    """What occurs among the rows of a step. The read-out launches nothing for the rest.

    Args:
        active: [S] streams that run.
        rules: rules that occur, but the plain sum.
        heads: indices of the classifier heads that these rules read.
        valued: whether value streams add to any row.
        uniform_sum: whether every row sums the same streams, the base and more.
        layers: rules over layers that occur.
        searched: whether any has a nucleus, or a count of plausible ids above 1.
        shared: whether any `SELECT` has a count.
        masked: whether any row sets all ids but its candidates back.
    """

    active: tuple[bool, ...]
    rules: frozenset[RuleKind] = frozenset()
    heads: tuple[int, ...] = ()
    valued: bool = False
    uniform_sum: bool = False
    layers: frozenset[LayerKind] = frozenset()
    searched: bool = False
    shared: bool = False
    masked: bool = False

    @classmethod
    def all(cls, streams: int, heads: int = 0, taps: bool = False) -> Self:
        """Classes of rows about which nothing is known: vLLM's dummy runs. What is shared of top
        lists is none of theirs: it would only take time.

        Args:
            streams: S.
            heads: how many classifier heads there are.
            taps: whether there are any.
        """
        layers = frozenset(LayerKind) - {LayerKind.NONE} if taps else frozenset()
        rules, known = frozenset(RuleKind), tuple(range(heads))
        return cls((True,) * streams, rules, known, True, layers=layers, searched=True)

    @classmethod
    def of(
        cls, active: tuple[bool, ...], tables: BatchTables, schedule: Schedule | None = None
    ) -> Self:
        """The classes of the rows of a step's requests.

        Args:
            active: [S] streams that run.
            tables: of the requests.
            schedule: of the step; None: any phase of theirs may hold.
        """
        if not tables.has_rules:
            return cls(active, uniform_sum=tables.uniform_sum)
        lines, values = tables.control, tables.values
        if tables.phases is not None:
            lines = tables.phases.lines
        if schedule is not None:
            kept = tables.may_hold(schedule)
            lines, values = lines[kept], tuple(compress(values, kept))
        extra = lines[:, len(active) :]
        kinds, counts = extra[:, RULE_KIND].astype(np.int64), extra[:, RULE_COUNT]
        select, plausible = kinds == RuleKind.SELECT, kinds == RuleKind.PLAUSIBLE
        reads = select & (extra[:, RULE_OPTIONS].astype(np.int64) & 3 == Gate.HEAD)
        several = plausible & (counts > 0) & (counts != 1)
        return cls(
            active,
            frozenset(map(RuleKind, np.unique(kinds))) - {RuleKind.SUM},
            tuple(np.unique(extra[reads, RULE_HEAD]).astype(np.int64).tolist()),
            any(values),
            layers=frozenset(map(LayerKind, np.unique(extra[:, LAYERS]).astype(np.int64).tolist()))
            - {LayerKind.NONE},
            searched=bool(((kinds == RuleKind.NUCLEUS) | several).any()),
            shared=bool((select & (counts > 0)).any()),
            masked=any(one.mask for one in values if one),
        )

    @property
    def has_rules(self) -> bool:
        """Whether any row has a rule other than the plain sum, or values."""
        return bool(self.rules or self.layers) or self.valued


class Valued(NamedTuple):
    """A request that draws in a step, and that value streams may add to there."""

    row: int
    """Which request of the step."""
    lines: tuple[tuple[int, Values], ...]
    """(line of control, what is added to a token that has it); nothing to one with another."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Args:
        schedule: what vLLM scheduled.
        tables: the states of its requests.
        batches: [S] what each stream runs; None where it runs nothing, or all that was scheduled.
            Streams that share a batch have the same object.
        classes: what occurs among its rows.
        valued: requests that draw in this step and that value streams may add to.
    """

    schedule: Schedule
    tables: BatchTables
    batches: tuple[StreamBatch | None, ...]
    classes: Classes
    valued: tuple[Valued, ...]

    def ran(self, request: int, names: Sequence[str]) -> tuple[str, ...]:
        """The streams that it runs for one of its requests, once for each pass.

        Args:
            request: its number in the step.
            names: of the streams that run anything, base first.
        """
        used = [n for n, uses in zip(names, self.tables.uses[request], strict=False) if uses]
        lines = next((one.lines for one in self.valued if one.row == request), ())
        return (*used, *sorted({name for _, values in lines for name, _ in values.strengths}))


def plan_step(schedule: Schedule, tables: BatchTables) -> StepPlan:
    """The plan of a step.

    Args:
        schedule: what vLLM scheduled.
        tables: of the same requests, in the same order.

    Raises:
        RuntimeError: a request that value streams add to verifies drafts: only its last token's
            candidates would be valued.
    """
    valued = _valued(schedule, tables)
    if drafted := [schedule.request_ids[one.row] for one in valued if schedule.drafts[one.row]]:
        raise RuntimeError(f"requests with values verify drafts: {drafted}")
    streams = tables.uses.shape[1]
    batches: list[StreamBatch | None] = []
    for i in range(streams):
        if tables.full_batch[i]:
            batches.append(None)
        elif (first := tables.shares_batch_with[i]) < i:
            batches.append(batches[first])
        else:
            uses, offsets = tables.uses[:, i], tables.offsets[:, i]
            batches.append(stream_batch(schedule, uses, offsets, tables.prompts[i]))
    active = tuple(
        full or batch is not None for full, batch in zip(tables.full_batch, batches, strict=True)
    )
    return StepPlan(
        schedule,
        tables,
        tuple(batches),
        Classes.of(active, tables, schedule),
        valued,
    )


def _valued(schedule: Schedule, tables: BatchTables) -> tuple[Valued, ...]:
    if not tables.values:
        return ()
    kept, found = tables.may_hold(schedule), dict[int, list[tuple[int, Values]]]()
    for line, values in enumerate(tables.values):
        row = line if tables.phases is None else int(tables.phases.rows[line])
        if values is not None and kept[line] and schedule.draws[row]:
            found.setdefault(row, []).append((line, values))
    return tuple(Valued(row, tuple(found[row])) for row in sorted(found))
