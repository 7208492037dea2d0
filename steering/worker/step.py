"""Runs the streams of one step, as its plan says, into the steered model's hidden states.

Lives in the worker; one `Step` per steered model, made once vLLM's runner is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steering.worker.adapting import Adapted
from steering.worker.batches import Candidates, Int64, Schedule, StreamBatch
from steering.worker.contexts import StreamContexts
from steering.worker.lora_seam import LoraSeam
from steering.worker.overlaps import read_as
from steering.worker.readout import Readout
from steering.worker.staging import StagedBatch, stage, stage_step, to_device
from steering.worker.step_plan import StepPlan
from steering.worker.values import ValueStreams, candidates_of


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
    """

    names: Sequence[str]
    original: dict[str, str]
    models: Sequence[Any]
    readout: Readout
    values: ValueStreams
    contexts: StreamContexts
    adapters: LoraSeam | None
    counters: Counters
    adapted: Adapted | None = field(default=None, init=False)
    """The adapters of the current step's requests."""
    _schedule: Schedule | None = field(default=None, init=False)

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
    ) -> torch.Tensor:
        """[T, H_0] the base's hidden states, over the step as scheduled."""
        self.counters.count(self.names[0], positions.shape[0])
        with self._adapting(0, None, positions):
            return forward(self.models[0], input_ids, positions, inputs_embeds)

    def steered(
        self,
        plan: StepPlan,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        control: npt.NDArray[np.float32],
    ) -> torch.Tensor:
        """[T, width] the hidden states of all streams and the control.

        Args:
            plan: of the step.
            input_ids: [T] the base's ids, padding included.
            positions: [T].
            control: [t ≤ T, S + EXTRA].
        """
        layout, device = self.readout.layout, positions.device
        out = torch.zeros(positions.shape[0], layout.width, dtype=layout.dtype, device=device)
        distinct = plan.distinct
        batches, there = stage_step(distinct, control, device)
        staged = dict(zip(map(id, distinct), batches, strict=True))
        for i, batch in enumerate(plan.batches):
            if batch is not None:
                self._run_batch(i, staged[id(batch)], input_ids, out)
            elif plan.classes.active[i]:
                self._run_full(i, plan.schedule.tokens, input_ids, positions, out)
        layout.write_control(out, there)
        if plan.valued:
            self._add_values(plan, input_ids, out)
        return out

    def draft_scores(
        self, i: int, token_ids: torch.Tensor, batch: StagedBatch, size: int
    ) -> torch.Tensor:
        """[n, size] scores of the draft stream behind n requests; see `drafting.Score`."""
        ids = read_as(token_ids.int(), self.readout.vocabularies[i].read_as)
        with (
            self.contexts.between_steps(i, batch),
            self._adapting(i, batch.host, batch.positions),
        ):
            hidden = forward(self.models[i], ids, batch.positions)
        self.counters.count(self.names[i], batch.host.rows.size)
        return self.readout.draft_scores(i, hidden, size)

    def _run_full(
        self,
        i: int,
        tokens: int,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Runs stream i on all the step's tokens, into its columns of `out`."""
        ids = read_as(input_ids, self.readout.vocabularies[i].read_as)
        with self.contexts.step(i, None), self._adapting(i, None, positions):
            hidden = forward(self.models[i], ids, positions)
        out[:, self.readout.layout.columns(i)] = hidden
        self.counters.count(self.names[i], tokens)

    def _run_batch(
        self, i: int, batch: StagedBatch, input_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Runs stream i on the tokens of a batch, into its columns of their rows of `out`."""
        ids = read_as(input_ids[batch.tokens], self.readout.vocabularies[i].read_as)
        if batch.own_at.numel():
            ids[batch.own_at] = batch.own_ids.to(ids.dtype)
        with self.contexts.step(i, batch), self._adapting(i, batch.host, batch.positions):
            hidden = forward(self.models[i], ids, batch.positions)
        out[batch.tokens, self.readout.layout.columns(i)] = hidden
        self.counters.count(self.names[i], batch.host.tokens.size)

    def _add_values(self, plan: StepPlan, input_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Writes what value streams add to the rows that draw a token into `out`."""
        layout, schedule, tables = self.readout.layout, plan.schedule, plan.tables
        rows = [row for row, _ in plan.valued]
        at = (schedule.starts[1:][rows] - 1).astype(np.int64)
        last, which = to_device([at, tables.ends_of(rows)], out.device)

        def hidden(stream: int) -> torch.Tensor:
            return out[last, layout.columns(stream)]

        def run(stream: int, tokens: torch.Tensor, batch: Candidates) -> torch.Tensor:
            [staged] = stage([batch], out.device)
            self.contexts.begin_candidates(stream, staged)
            with (
                self.contexts.step(stream, staged),
                self._adapting(stream, batch, staged.positions),
            ):
                self.counters.count(self.names[stream], batch.rows.size)
                ids = tokens.to(input_ids.dtype)
                return forward(self.models[stream], ids, staged.positions)

        scores = candidates_of(self.models[0].compute_logits(hidden(0)), self.readout.padded)
        ends, note = self.readout.ends.of(which), self.readout.watch.requests
        offsets = tables.offsets
        add = self.values.add(plan.valued, scores, hidden, schedule, offsets, run, ends, note)
        layout.write_additions(out, last, add.ids, add.added)

    def _adapting(
        self, i: int, batch: StreamBatch | None, positions: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Makes stream i's layers add its requests' adapters; None is the step as scheduled."""
        if self.adapted is None:
            return nullcontext()
        assert self.adapters is not None and self._schedule is not None
        if batch is None:
            lengths = self._schedule.lengths
            requests: Int64 = np.repeat(np.arange(lengths.size), lengths)
        else:
            requests = batch.rows[batch.token_rows]
        stream = self.names[i], self.original[self.names[i]]
        total, device = positions.shape[0], positions.device
        return self.adapters.adapting(self.adapted, stream, requests, total, device)


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
