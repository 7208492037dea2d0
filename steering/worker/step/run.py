"""Runs the streams of one step, as its plan says, into the steered model's hidden states.

Lives in the worker; one `Step` per steered model, made once vLLM's runner is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from steering.worker.adapting.groups import Adapted
from steering.worker.adapting.lora_seam import LoraSeam
from steering.worker.adapting.triton import Pass
from steering.worker.plan.batches import Candidates, Int64, Schedule, StreamBatch, decoding_batch
from steering.worker.plan.staging import StagedBatch, Staging, arrays_of
from steering.worker.plan.step_plan import StepPlan
from steering.worker.readout.overlaps import read_as
from steering.worker.readout.readout import Readout
from steering.worker.step.contexts import StreamContexts
from steering.worker.step.graphs import StreamGraphs
from steering.worker.step.values import ValueStreams, candidates_of


@dataclass
class Counters:
    """Cumulative counts since start.

    Args:
        steps: steps with requests.
        passes: forward passes by stream.
        tokens: tokens run by stream.
    """

    passes: dict[str, int]
    tokens: dict[str, int]
    steps: int = 0

    def count(self, stream: str, tokens: int) -> None:
        """One pass of a stream over some tokens."""
        self.passes[stream] += 1
        self.tokens[stream] += tokens


class Run(NamedTuple):
    """One pass of a stream.

    Args:
        stream: index.
        batch: what it runs; None is the step as scheduled.
        size: padded rows of the graph that is replayed for it; 0 for none.
    """

    stream: int
    batch: StreamBatch | None
    size: int = 0


@dataclass
class Step:
    """Runs steps.

    Args:
        names: [S] of the streams, base first.
        original: stream → the one whose model it runs.
        models: [S] the streams' models.
        readout: has the layout of hidden states, and the vocabularies.
        values: the value streams.
        contexts: of the streams.
        adapters: None without LoRA.
        counters: grow.
        graphs: None where every pass is launched piece by piece.
    """

    names: Sequence[str]
    original: dict[str, str]
    models: Sequence[Any]
    readout: Readout
    values: ValueStreams
    contexts: StreamContexts
    adapters: LoraSeam | None
    counters: Counters
    graphs: StreamGraphs | None = None
    adapted: Adapted | None = field(default=None, init=False)
    """The adapters of the current step's requests."""
    _schedule: Schedule | None = field(default=None, init=False)
    _staged: dict[int, StagedBatch] = field(default_factory=dict, init=False)

    def begin(self, plan: StepPlan, sets: Int64) -> None:
        """Takes the adapters of a step's requests, which the passes until the next one add.

        Args:
            plan: of the step.
            sets: [Q] ids of the requests' sets of adapters.

        Raises:
            RuntimeError: as `LoraSeam.adapted`.
        """
        uses, counting = plan.tables.adapters, bool(plan.tables.reported)
        self.adapted = self.adapters.adapted(uses, sets, counting) if self.adapters else None
        self._schedule = plan.schedule
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
        self._send(staging, runs, input_ids, positions.shape[0], positions.device)
        return self._pass(run, input_ids, positions, inputs_embeds)

    def steered(
        self,
        plan: StepPlan,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        control: npt.NDArray[np.float32],
        staging: Staging,
    ) -> torch.Tensor:
        """[T, width] the hidden states of all streams and the control.

        Args:
            plan: of the step.
            input_ids: [T] the base's ids, padding included.
            positions: [T].
            control: [t ≤ T, S + EXTRA].
            staging: is sent, with what the passes read.
        """
        layout, device = self.readout.layout, positions.device
        out = torch.zeros(positions.shape[0], layout.width, dtype=layout.dtype, device=device)
        active = plan.classes.active
        staging.add([control], lambda there: layout.write_control(out, there[0]))
        valued: list[torch.Tensor] = []
        if plan.valued:
            rows = [row for row, _ in plan.valued]
            at = (plan.schedule.starts[1:][rows] - 1).astype(np.int64)
            staging.add([at, plan.tables.ends_of(rows)], valued.extend)
        runs = self._runs([(i, b) for i, b in enumerate(plan.batches) if active[i]], positions)
        self._send(staging, runs, input_ids, positions.shape[0], device)
        for run in runs:
            hidden, columns = self._pass(run, input_ids, positions), layout.columns(run.stream)
            if plan.batches[run.stream] is None:
                out[: hidden.shape[0], columns] = hidden
            else:
                out[self._tokens(run), columns] = hidden
        if plan.valued:
            self._add_values(plan, input_ids, out, *valued)
        return out

    def draft_scores(
        self, i: int, token_ids: torch.Tensor, batch: StagedBatch, size: int
    ) -> torch.Tensor:
        """[n, size] scores of the draft stream behind n requests; see `drafting.Score`."""
        host, ids = batch.host, read_as(token_ids.int(), self.readout.vocabularies[i].read_as)
        run = Run(i, host, 0 if self.graphs is None else self.graphs.size_for(i, host))
        self._send(Staging(), [run], ids, ids.shape[0], ids.device, stage=False)
        if run.size:
            assert self.graphs is not None
            self.graphs.put_own(i, ids, batch.positions)
            hidden = self._pass(run, ids, batch.positions)
        else:
            adapting = self._adapting(run, ids.shape[0], ids.device)
            with self.contexts.between_steps(i, batch), adapting:
                hidden = forward(self.models[i], ids, batch.positions)
            self.counters.count(self.names[i], host.rows.size)
        return self.readout.draft_scores(i, hidden, size)

    def _runs(
        self,
        wanted: Sequence[tuple[int, StreamBatch | None]],
        positions: torch.Tensor,
        *,
        graphs: bool = True,
    ) -> list[Run]:
        """Some streams' passes over some batches, each by a graph if one fits.

        Args:
            wanted: (stream, batch), as in `Run`.
            positions: [T] of the step; models may want more of each than a number.
            graphs: whether any may be replayed.
        """
        if self.graphs is None or not graphs or positions.dim() != 1:
            return [Run(*one) for one in wanted]
        assert self._schedule is not None
        decoding = decoding_batch(self._schedule, positions.shape[0])
        found = []
        for i, batch in wanted:
            size = self.graphs.size_for(i, own := batch or decoding)
            found.append(Run(i, own if size else batch, size))
        return found

    def _send(
        self,
        staging: Staging,
        runs: Sequence[Run],
        input_ids: torch.Tensor | None,
        total: int,
        device: torch.device,
        *,
        stage: bool = True,
    ) -> None:
        """Brings what some passes read to the device, with what `staging` has already.

        Args:
            staging: is sent.
            runs: of different streams.
            input_ids: [T] of the step; None without graphs.
            total: T.
            device: of the streams.
            stage: whether the batches that no graph runs are not there yet.
        """
        self._staged = {}
        eager = {id(b): b for _, b, size in runs if stage and b is not None and not size}
        for batch in eager.values():
            self._stage(staging, batch)
        if self.adapters is not None and self.adapters.triton is not None:
            for write in self.adapters.writes(self.adapted, [self._named(r, total) for r in runs]):
                staging.add(write.arrays, partial(self.adapters.put, write))
        replayed = {i: batch for i, batch, size in runs if size and batch is not None}
        if replayed:
            assert self.graphs is not None and input_ids is not None
            inputs = self.graphs.inputs(replayed, self.contexts.scratch)
            put, ids = self.graphs.put, input_ids
            staging.add([inputs], lambda there: put(there[0], ids))
        staging.send(device)

    def _stage(self, staging: Staging, batch: StreamBatch) -> None:
        def note(there: Sequence[torch.Tensor]) -> None:
            self._staged[id(batch)] = StagedBatch(batch, *there)

        staging.add(arrays_of(batch), note)

    def _tokens(self, run: Run) -> torch.Tensor:
        """[n] int64 where the rows of a pass lie in the step, once it ran."""
        assert run.batch is not None
        if run.size:
            assert self.graphs is not None
            return self.graphs.tokens(run.stream, run.batch)
        return self._staged[id(run.batch)].tokens

    def _pass(
        self,
        run: Run,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T_i, H] a stream's hidden states of what it runs."""
        i, batch, size = run
        if size:
            assert self.graphs is not None and batch is not None
            self.counters.count(self.names[i], batch.rows.size)
            hidden = self.graphs.run(i, batch, size)
            if self.adapters is not None and self.adapted is not None:
                self.adapters.routed(self.adapted, self.names[i])
            return hidden
        table = self.readout.vocabularies[i].read_as
        if batch is None:
            assert self._schedule is not None
            self.counters.count(self.names[i], self._schedule.tokens)
            ids = input_ids if input_ids is None else read_as(input_ids, table)
            with self._running(run, positions):
                return forward(self.models[i], ids, positions, inputs_embeds)
        assert input_ids is not None
        staged = self._staged[id(batch)]
        ids = read_as(input_ids[staged.tokens], table)
        if staged.own_at.numel():
            ids[staged.own_at] = staged.own_ids.to(ids.dtype)
        self.counters.count(self.names[i], batch.tokens.size)
        with self._running(run, staged.positions):
            return forward(self.models[i], ids, staged.positions)

    @contextmanager
    def _running(self, run: Run, positions: torch.Tensor) -> Iterator[None]:
        """The context of a pass that is launched piece by piece."""
        staged = None if run.batch is None else self._staged[id(run.batch)]
        adapting = self._adapting(run, positions.shape[0], positions.device)
        with self.contexts.step(run.stream, staged), adapting:
            yield

    def _add_values(
        self,
        plan: StepPlan,
        input_ids: torch.Tensor,
        out: torch.Tensor,
        last: torch.Tensor,
        which: torch.Tensor,
    ) -> None:
        """Writes what value streams add to the rows that draw a token into `out`.

        Args:
            plan: of the step.
            input_ids: [T] of the step.
            out: [T, width], changed in place.
            last: [n] int64 the last token of each row, and
            which: [n] float32 the set of ids that ends its text.
        """
        layout, schedule, tables = self.readout.layout, plan.schedule, plan.tables

        def hidden(stream: int) -> torch.Tensor:
            return out[last, layout.columns(stream)]

        def run(stream: int, tokens: torch.Tensor, batch: Candidates) -> torch.Tensor:
            return self._candidates(stream, tokens.to(input_ids.dtype), batch)

        scores = candidates_of(self.models[0].compute_logits(hidden(0)), self.readout.padded)
        ends, note = self.readout.ends.of(which), self.readout.watch.requests
        offsets = tables.offsets
        add = self.values.add(plan.valued, scores, hidden, schedule, offsets, run, ends, note)
        layout.write_additions(out, last, add.ids, add.added)

    def _candidates(self, i: int, ids: torch.Tensor, batch: Candidates) -> torch.Tensor:
        """[n, H] stream i's hidden states of candidates, whose ids are its own."""
        size = self.graphs.size_for(i, batch) if self.graphs is not None else 0
        run, staging = Run(i, batch, size), Staging()
        if size:
            self._stage(staging, batch)
        self._send(staging, [run], ids, ids.shape[0], ids.device)
        staged = self._staged[id(batch)]
        self.contexts.begin_candidates(i, staged)
        if size:
            assert self.graphs is not None
            self.graphs.put_own(i, ids)
            return self._pass(run, ids, staged.positions)
        self.counters.count(self.names[i], batch.rows.size)
        with self._running(run, staged.positions):
            return forward(self.models[i], ids, staged.positions)

    def _adapting(self, run: Run, total: int, device: torch.device) -> AbstractContextManager[None]:
        """Makes a stream's layers add its requests' adapters, in a pass whose tables are there."""
        if self.adapted is None:
            return nullcontext()
        assert self.adapters is not None
        one = self._named(run, total)
        return self.adapters.adapting(self.adapted, one, device, written=True)

    def _named(self, run: Run, total: int) -> Pass:
        """A pass as adapters know it.

        Args:
            run: the pass.
            total: tokens of the step, padding included.
        """
        i, batch, size = run
        name = self.names[i]
        if batch is None:
            assert self._schedule is not None
            lengths = self._schedule.lengths
            requests: Int64 = np.repeat(np.arange(lengths.size), lengths)
            return Pass(name, self.original[name], requests, total)
        requests = batch.rows[batch.token_rows]
        return Pass(name, self.original[name], requests, size or requests.size)


def forward(
    model: Any,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    inputs_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H] a model's hidden states. By keyword: models differ in what stands between."""
    hidden: torch.Tensor = model(
        input_ids=input_ids,
        positions=positions,
        intermediate_tensors=None,
        inputs_embeds=inputs_embeds,
    )
    return hidden
