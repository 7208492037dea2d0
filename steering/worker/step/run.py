"""Runs the streams of one step, as its plan says, into the steered model's hidden states.

Lives in the worker; one `Step` per steered model, made once vLLM's runner is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from steering.worker.plan.batches import Candidates, Int64, StreamBatch
from steering.worker.plan.phases import PhasedStep
from steering.worker.plan.staging import StagedBatch, Staging
from steering.worker.plan.step_plan import StepPlan
from steering.worker.plan.texts import NOTHING, Told
from steering.worker.readout.overlaps import read_as
from steering.worker.step.drafting import Drafts
from steering.worker.step.passes import Again, Passes, Run, forward
from steering.worker.step.values import ValuePlan, ValueStreams, candidates_of


class Tap(NamedTuple):
    """A stream that reads what a layer of another kept of the other's pass."""

    stream: int
    """Its index."""
    kept: torch.Tensor
    """[most tokens, H] where the layer's input lies."""
    finish: Callable[[torch.Tensor], torch.Tensor]
    """[T, H] of these → what the unembedding takes."""


@dataclass(kw_only=True)
class Step(Passes):
    """Runs steps. Other arguments as of `Passes`.

    Args:
        values: the value streams.
        taps: stream → its taps.
        holds: whether the runner still has a request.
    """

    values: ValueStreams
    holds: Callable[[str], bool] = bool
    taps: Mapping[int, Sequence[Tap]] = field(default_factory=dict)
    drafts: Drafts | None = None
    """How steps draft on Model Runner V2; None where they do not."""
    _drafting: tuple[Again, torch.Tensor] | None = field(default=None, init=False)
    """The pass that drafts behind the current step, and [n] int64 by how much its rows lag."""

    def begin(self, plan: StepPlan, sets: Int64, told: Told = NOTHING) -> None:
        """Takes the adapters of a step's requests, which the passes until the next one add.

        Args:
            plan: of the step.
            sets: [Q] ids of the requests' sets of adapters.
            told: what is known of its tokens.

        Raises:
            RuntimeError: as `LoraSeam.adapted`.
        """
        uses, counting = plan.tables.adapters, bool(plan.tables.reported)
        self.adapted = None
        if self.adapters is not None:
            ids = plan.schedule.request_ids
            self.adapted = self.adapters.adapted(uses, sets, counting, ids, self.holds)
        self._told = told
        self._schedule, self._tables, self._drafting = plan.schedule, plan.tables, None
        self.counters.steps += 1

    def base(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        staging: Staging,
    ) -> torch.Tensor:
        """[T, H_0] the base's hidden states, over the step as scheduled; sends `staging`."""
        [run] = runs = self._runs([(0, None)], positions, graphs=inputs_embeds is None)
        self._send(staging, runs, input_ids, positions)
        return self._pass(run, input_ids, positions, inputs_embeds)

    def steered(
        self,
        plan: StepPlan,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        control: npt.NDArray[np.float32] | PhasedStep,
        staging: Staging,
    ) -> torch.Tensor:
        """[T, width] the hidden states of all streams and the control.

        Args:
            plan: of the step.
            input_ids: [T] the base's ids, padding included.
            positions: [T].
            control: [t ≤ T, S + EXTRA], or what it depends on.
            staging: is sent, with what the passes read.
        """
        layout, device = self.readout.layout, positions.device
        out = torch.zeros(positions.shape[0], layout.width, dtype=layout.dtype, device=device)
        active = plan.classes.active
        lines: list[torch.Tensor] = []
        if isinstance(control, PhasedStep):
            phased = control

            def put(there: Sequence[torch.Tensor]) -> None:
                lines.append(phased.line(there, input_ids, positions))
                layout.write_control(out, there[0][lines[0]])

            staging.add(control.arrays(), put)
        else:
            staging.add([control], lambda there: layout.write_control(out, there[0]))
        batches = [(i, plan.batches[i]) for i, _ in enumerate(self.names) if active[i]]
        runs = self._runs(batches, positions)
        valued = self._plan_values(plan, staging) if plan.valued else None
        again = [] if valued is None else [*valued.passes.values()]
        again += self._plan_drafts(plan, staging)
        self._send(staging, runs, input_ids, positions, again)
        for run in runs:
            hidden, columns = self._pass(run, input_ids, positions), layout.columns(run.stream)
            if plan.batches[run.stream] is None:
                out[: hidden.shape[0], columns] = hidden
            else:
                out[self._tokens(run), columns] = hidden
            self._tap(run, plan, out, hidden.shape[0])
        if valued is not None:
            self._add_values(valued, input_ids.dtype, out, *lines)
        return out

    def _tap(self, run: Run, plan: StepPlan, out: torch.Tensor, count: int) -> None:
        """Writes what the taps of a stream read of its pass, before another overwrites it.

        Args:
            run: the pass, of `count` tokens.
            plan: of the step.
            out: [T, width], changed in place.
            count: T_i.
        """
        for tap in self.taps.get(run.stream, ()):
            if not plan.classes.active[tap.stream]:
                continue
            hidden = tap.finish(self._kept(run, tap.kept, count))
            columns = self.readout.layout.columns(tap.stream)
            if plan.batches[run.stream] is None:
                out[:count, columns] = hidden
            else:
                out[self._tokens(run), columns] = hidden

    # --- candidates of value streams ------------------------------------------------------------

    def _plan_values(self, plan: StepPlan, staging: Staging) -> _Valued:
        """What value streams will run behind the step's passes; what that reads goes along."""
        rows = [one.row for one in plan.valued]
        at = (plan.schedule.starts[1:][rows] - 1).astype(np.int64)
        count, offsets = len(plan.tables.values), plan.tables.offsets
        values = self.values.plan(plan.valued, plan.schedule, offsets, count)
        passes = {id(b): self._again(stream, b) for stream, b in values.batches}
        found = _Valued(values, passes)
        staging.add([at, plan.tables.ends_of(rows)], found.rows.extend)
        staging.add(values.arrays, found.arrays.extend)
        return found

    def _add_values(
        self,
        valued: _Valued,
        dtype: torch.dtype,
        out: torch.Tensor,
        lines: torch.Tensor | None = None,
    ) -> None:
        """Writes what value streams add to the rows that draw a token into `out`.

        Args:
            valued: of the step; its arrays are there.
            dtype: of token ids.
            out: [T, width], changed in place.
            lines: [T] the line of control of each token; None: no request has phases.
        """
        layout, (last, which) = self.readout.layout, valued.rows

        def hidden(stream: int) -> torch.Tensor:
            return out[last, layout.columns(stream)]

        def run(stream: int, tokens: torch.Tensor, batch: Candidates) -> torch.Tensor:
            return self._candidates(valued.passes[id(batch)], tokens.to(dtype))

        scores = candidates_of(self.models[0].compute_logits(hidden(0)), self.readout.padded)
        ends, note = self.readout.ends.of(which), self.readout.watch.requests
        line = None if lines is None else lines[last]
        add = self.values.add(valued.plan, valued.arrays, line, scores, hidden, run, ends, note)
        layout.write_additions(out, last, add.ids, add.added)

    def _candidates(self, one: Again, ids: torch.Tensor) -> torch.Tensor:
        """[n, H] a value stream's hidden states of candidates, whose ids are its own."""
        run, staged = one.run, self._begin_again(one)
        self.contexts.begin_candidates(run.stream, staged)
        if run.shape:
            assert self.graphs is not None
            self.graphs.put_own(run.stream, ids)
            return self._pass(run, ids, staged.positions)
        self.counters.count(self.names[run.stream], ids.shape[0])
        with self._running(run, staged):
            return forward(self.models[run.stream], ids, staged.positions)

    # --- drafts ---------------------------------------------------------------------------------

    def _plan_drafts(self, plan: StepPlan, staging: Staging) -> list[Again]:
        """The pass that will draft behind the step, if any request drafts."""
        if self.drafts is None:
            return []
        rows, ends = self.drafts.rows(plan)
        if not rows.size:
            return []
        offsets = plan.tables.offsets[rows, self.drafts.stream]
        one = self._again(self.drafts.stream, StreamBatch.of(rows, ends - offsets))

        def note(there: Sequence[torch.Tensor]) -> None:
            self._drafting = one, there[0]

        staging.add([offsets.astype(np.int64)], note)
        return [one]

    def draft(self, newest: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[Q, K] int64 drafts behind the step that has just run; nothing asks the device.

        Args:
            newest: [Q] int64 index of each request's newest token.
            ids: [Q] int64 these tokens.
        """
        assert self.drafts is not None
        i, count = self.drafts.stream, self.drafts.tokens
        drafts = ids[:, None].repeat(1, count)
        if self._drafting is None:
            return drafts
        (one, lag), self._drafting = self._drafting, None
        staged = self._begin_again(one)
        rows, bounds = staged.host.rows, staged.host.positions.astype(np.int32)
        own, ends = ids[staged.rows], newest[staged.rows] - lag
        for k in range(count):
            batch = staged.at(ends + k, StreamBatch.of(rows, bounds + k))
            run = Run(i, batch.host, one.run.shape)
            own = self._draft_scores(run, own, batch, self.drafts.size, written=True).argmax(-1)
            drafts[staged.rows, k] = own
        return drafts

    def draft_scores(
        self, i: int, token_ids: torch.Tensor, batch: StagedBatch, size: int
    ) -> torch.Tensor:
        """[n, size] scores of the draft stream behind n requests; see `drafting.Score`."""
        return self._draft_scores(Run(i, batch.host), token_ids, batch, size, written=False)

    def _draft_scores(
        self, run: Run, token_ids: torch.Tensor, batch: StagedBatch, size: int, *, written: bool
    ) -> torch.Tensor:
        i, ids = run.stream, read_as(token_ids.int(), self.readout.vocabularies[run.stream].read_as)
        if run.shape:
            assert self.graphs is not None
            self.graphs.put_own(i, ids, batch.positions)
            hidden = self._pass(run, ids, batch.positions)
        else:
            self.counters.count(self.names[i], ids.shape[0])
            adapting = self._adapting(run, ids.shape[0], written=written)
            with self.contexts.between_steps(i, batch), adapting:
                hidden = forward(self.models[i], ids, batch.positions)
        return self.readout.draft_scores(i, hidden, size)


@dataclass(frozen=True)
class _Valued:
    """The candidates of a step.

    Args:
        plan: which there are.
        passes: id of a batch → the pass that runs it.
        rows: [n] int64 the last token of each row, and [n] float32 the set of ids that ends its
            text; once they are there.
        arrays: the plan's; once they are there.
    """

    plan: ValuePlan
    passes: dict[int, Again]
    rows: list[torch.Tensor] = field(default_factory=list)
    arrays: list[torch.Tensor] = field(default_factory=list)
