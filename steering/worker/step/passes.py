"""Passes of streams: which are replayed, what they read, and how they run.

All that the passes of a step read goes to the device in one copy. A stream may run again in the
same step, behind its own pass: candidates of value streams, and drafts. What these read goes with
the rest, and waits there, since a stream's graphs and its adapters' tables have one place each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from steering.worker.adapting.groups import Adapted
from steering.worker.adapting.lora_seam import LoraSeam
from steering.worker.adapting.triton import Pass, Write
from steering.worker.plan.batches import Bool, Int64, Schedule, StreamBatch, whole_batch
from steering.worker.plan.request_state import BatchTables
from steering.worker.plan.staging import StagedBatch, Staging, arrays_of
from steering.worker.plan.texts import NOTHING, Told
from steering.worker.readout.overlaps import read_as
from steering.worker.readout.readout import Readout
from steering.worker.step.contexts import StreamContexts
from steering.worker.step.graph_inputs import PIECES, Shape
from steering.worker.step.graphs import StreamGraphs


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
        shape: of the graph that is replayed for it; None for none.
    """

    stream: int
    batch: StreamBatch | None
    shape: Shape | None = None


@dataclass(eq=False)
class Again:
    """A pass of a stream behind its own, and what it reads, on the device.

    Args:
        run: the pass, over one-token rows.
        batch: its rows.
        inputs: [9, N] what its graph reads; None without one.
        tables: of its adapters, if others than before must lie there.
    """

    run: Run
    batch: StagedBatch | None = None
    inputs: torch.Tensor | None = None
    tables: tuple[Write, Sequence[torch.Tensor]] | None = None


@dataclass(kw_only=True)
class Passes:
    """Runs passes.

    Args:
        names: [S] of the streams, base first.
        original: stream → the one whose model it runs.
        models: [S] the streams' models.
        readout: has the layout of hidden states, and the vocabularies.
        contexts: of the streams.
        adapters: None without LoRA.
        counters: grow.
        graphs: None where every pass is launched piece by piece.
    """

    names: Sequence[str]
    original: dict[str, str]
    models: Sequence[Any]
    readout: Readout
    contexts: StreamContexts
    adapters: LoraSeam | None
    counters: Counters
    graphs: StreamGraphs | None = None
    adapted: Adapted | None = field(default=None, init=False)
    """The adapters of the current step's requests."""
    _own: Sequence[StreamBatch | None] = field(default=(), init=False)
    """The batches of the current step's own passes."""
    _told: Told = field(default=NOTHING, init=False)
    _schedule: Schedule | None = field(default=None, init=False)
    _tables: BatchTables | None = field(default=None, init=False)
    _staged: dict[int, StagedBatch] = field(default_factory=dict, init=False)

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
            positions: [T] of the step.
            graphs: whether any may be replayed.
        """
        if self.graphs is None or not graphs:
            return [Run(*one) for one in wanted]
        assert self._schedule is not None
        whole = whole_batch(self._schedule, positions.shape[0], self.graphs.widest)
        # Padding would be counted where a report counts how tokens were routed.
        exact, found = self.adapted is not None and self.adapted.counting, []
        for i, batch in wanted:
            shape = self.graphs.shape_for(i, own := batch or whole, exact=exact)
            found.append(Run(i, own if shape else batch, shape))
        return found

    def _again(self, stream: int, batch: StreamBatch) -> Again:
        """Another pass of a stream, over one-token rows."""
        shape = None
        if self.graphs is not None:
            shape = self.graphs.shape_for(stream, batch, exact=True, whole=True)
        return Again(Run(stream, batch, shape))

    def _send(
        self,
        staging: Staging,
        runs: Sequence[Run],
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        again: Sequence[Again] = (),
    ) -> None:
        """Brings what some passes read to the device, with what `staging` has already.

        Args:
            staging: is sent.
            runs: of different streams.
            input_ids: [T] of the step; None without graphs.
            positions: [T] of the step.
            again: further passes, in the order in which they will run.
        """
        self._staged, self._own = {}, [run.batch for run in runs]
        for batch in {id(b): b for _, b, shape in runs if b is not None and not shape}.values():
            staging.add(arrays_of(batch), partial(self._note, batch))
        for one in again:
            self._stage_again(staging, one)
        self._stage_tables(staging, runs, again, positions.shape[0])
        replayed = {i: (b, shape) for i, b, shape in runs if shape and b is not None}
        if replayed:
            assert self.graphs is not None and input_ids is not None
            inputs = self.graphs.inputs(replayed, self.contexts.scratch)
            put, ids = self.graphs.put, input_ids
            staging.add([inputs], lambda there: put(there[0], ids))
        staging.send(positions.device)

    def _note(self, batch: StreamBatch, there: Sequence[torch.Tensor]) -> None:
        self._staged[id(batch)] = StagedBatch(batch, *there)

    def _stage_again(self, staging: Staging, one: Again) -> None:
        batch = one.run.batch
        assert batch is not None
        arrays = [*arrays_of(batch)]
        if one.run.shape:
            assert self.graphs is not None
            arrays.append(self.graphs.inputs_of(batch, self.contexts.scratch))

        def note(there: Sequence[torch.Tensor]) -> None:
            one.batch = StagedBatch(batch, *there[:8])
            one.inputs = there[8] if one.run.shape else None

        staging.add(arrays, note)

    def _stage_tables(
        self, staging: Staging, runs: Sequence[Run], again: Sequence[Again], total: int
    ) -> None:
        if self.adapters is None or self.adapters.triton is None:
            return
        wanted = [*runs, *(one.run for one in again)]
        passes = [self._named(run, total) for run in wanted]
        for number, write in self.adapters.writes(self.adapted, passes):
            if number < len(runs):
                staging.add(write.arrays, partial(self.adapters.put, write))
            else:
                later = again[number - len(runs)]
                staging.add(write.arrays, partial(_keep_tables, later, write))

    def _begin_again(self, one: Again) -> StagedBatch:
        """Puts what another pass reads in its place, but for its ids; its rows."""
        assert one.batch is not None
        if one.tables is not None:
            assert self.adapters is not None
            self.adapters.put(*one.tables)
        if one.inputs is not None:
            assert self.graphs is not None
            self.graphs.put_later(one.run.stream, one.inputs)
        return one.batch

    def _tokens(self, run: Run) -> torch.Tensor:
        """[n] int64 where the rows of a pass lie in the step, once it ran."""
        assert run.batch is not None
        if run.shape:
            assert self.graphs is not None
            return self.graphs.tokens(run.stream, run.batch, run.shape)
        return self._staged[id(run.batch)].tokens

    def _kept(self, run: Run, buffer: torch.Tensor, count: int) -> torch.Tensor:
        """[T_i, H] the tokens of a pass that just ran, of a buffer that has them as the pass had.

        Args:
            run: the pass.
            buffer: [≥ T_i, H].
            count: T_i.
        """
        if not run.shape:
            return buffer[:count]
        assert self.graphs is not None and run.batch is not None
        return self.graphs.kept(run.stream, buffer, run.batch, run.shape)

    def _pass(
        self,
        run: Run,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T_i, H] a stream's hidden states of what it runs."""
        i, batch, shape = run
        if shape:
            assert self.graphs is not None and batch is not None
            self.counters.count(self.names[i], batch.tokens.size)
            hidden = self.graphs.run(i, batch, shape)
            if self.adapters is not None and self.adapted is not None:
                self.adapters.routed(self.adapted, self.names[i])
            return hidden
        table = self.readout.vocabularies[i].read_as
        if batch is None:
            assert self._schedule is not None
            self.counters.count(self.names[i], self._schedule.tokens)
            ids = input_ids if input_ids is None else read_as(input_ids, table)
            with self._running(run, None, positions.shape[0]):
                return forward(self.models[i], ids, positions, inputs_embeds)
        assert input_ids is not None
        staged = self._staged[id(batch)]
        ids = read_as(input_ids[staged.tokens], table)
        if staged.own_at.numel():
            ids[staged.own_at] = staged.own_ids.to(ids.dtype)
        self.counters.count(self.names[i], batch.tokens.size)
        with self._running(run, staged):
            return forward(self.models[i], ids, staged.positions)

    @contextmanager
    def _running(self, run: Run, staged: StagedBatch | None, total: int = 0) -> Iterator[None]:
        """The context of a pass within a step that is launched piece by piece.

        Args:
            run: the pass; what it reads is there.
            staged: its batch.
            total: tokens of the step, padding included, if it runs the step as scheduled.
        """
        with self.contexts.step(run.stream, staged), self._adapting(run, total, written=True):
            yield

    def _adapting(self, run: Run, total: int, *, written: bool) -> AbstractContextManager[None]:
        """Makes a stream's layers add its requests' adapters.

        Args:
            run: the pass.
            total: as for `_named`.
            written: whether its tables are in their place.
        """
        if self.adapted is None:
            return nullcontext()
        assert self.adapters is not None
        one = self._named(run, total)
        return self.adapters.adapting(self.adapted, one, self.contexts.device, written=written)

    def _named(self, run: Run, total: int) -> Pass:
        """A pass as adapters know it.

        Args:
            run: the pass.
            total: tokens of the step, padding included.
        """
        i, batch, shape = run
        name = self.names[i]
        if batch is None:
            assert self._schedule is not None
            lengths = self._schedule.lengths
            requests: Int64 = np.repeat(np.arange(lengths.size), lengths)
            first = (self._schedule.computed - self._schedule.starts[:-1])[requests]
            places = np.arange(requests.size) + first
            if self._told.positions is not None:
                places = self._told.positions
            active = self._active(i, requests, places)
            ahead, own = self._ahead(i, requests, places)
            return Pass(name, self.original[name], requests, total, active, ahead, own)
        requests, places = batch.rows[batch.token_rows], self._places(run)
        if shape and shape.width != PIECES:
            requests = np.repeat(batch.rows, shape.width)
            # Rows end together: shorter ones begin with padding.
            lasts = np.repeat(places[batch.starts[1:] - 1], shape.width)
            places = lasts + np.tile(np.arange(1 - shape.width, 1), batch.rows.size)
        active = self._active(i, requests, places)
        tokens = shape.tokens if shape else requests.size
        ahead, own = self._ahead(i, requests, places)
        return Pass(name, self.original[name], requests, tokens, active, ahead, own)

    def _places(self, run: Run) -> Int64:
        """[T_i] the stream's own positions in a batch. Those of a pass behind the step's own may be
        bounds: they are of drafts, which the next step reads anew.
        """
        assert run.batch is not None
        if self._told.positions is None or not any(run.batch is own for own in self._own):
            return run.batch.positions
        assert self._tables is not None
        offsets = self._tables.offsets[run.batch.rows[run.batch.token_rows], run.stream]
        return self._told.positions[run.batch.tokens] - offsets

    def _ahead(
        self, i: int, requests: Int64, positions: Int64
    ) -> tuple[Int64, Int64] | tuple[None, None]:
        """`Pass.ahead` and `Pass.lengths`. Arguments as of `_active`."""
        if self.adapted is None or not self.adapted.conditional:
            return None, None
        assert self._tables is not None
        lengths: Int64 = self._tables.lengths - self._tables.offsets[:, i]
        return np.minimum(positions - lengths[requests], 0), lengths

    def _active(self, i: int, requests: Int64, positions: Int64) -> Bool | None:
        """[T, W] where the step's adapters act in a pass; None: everywhere.

        Args:
            i: the stream.
            requests: [T] index of each token's request.
            positions: [T] the stream's own.
        """
        if self.adapted is None or not self.adapted.wheres:
            return None
        assert self._tables is not None
        lengths = (self._tables.lengths - self._tables.offsets[:, i])[requests]
        seen = {ids: at[requests] for ids, at in self._told.seen.items()}
        found: Bool = np.stack(
            [where.active(positions - lengths, lengths, seen) for where in self.adapted.wheres],
            axis=1,
        )
        return found


def _keep_tables(one: Again, write: Write, there: Sequence[torch.Tensor]) -> None:
    one.tables = write, there


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
