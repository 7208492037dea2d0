"""Captured graphs: a stream's pass over rows of as many tokens each, launched as a whole; and over
rows of any lengths, in pieces.

vLLM's own graphs hold one forward pass over the step as scheduled. Ours hold one stream's pass
over whichever rows use it, padded to one of a few numbers of rows, so steps in which requests use
different streams are replayed too. Rows have one token, or one and K drafts that are verified.
With prompts or parts of them rows have any lengths: such a pass is padded to one of a few numbers
of tokens, and its graphs are in pieces (`pieces`). A graph finds all that changes with the step at
fixed places:

    inputs   [S, 9, N] int32, written by the step's one copy from the host (`graph_inputs`)
    ids      [T] int32, the step's own token ids
    tables   vLLM's block tables of the step
    adapters their tables (`triton_adding`), if there are any

Each pass begins with a graph that reads the inputs into what the rest and attention backends read,
since backends prepare themselves behind it. Padded rows have no KV slot; results are discarded.

Checked on vLLM 0.32.0, Model Runner V2, emulated; has not been run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import parallel_state
from vllm.forward_context import (
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.model_executor.offloader.base import get_offloader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import current_stream
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from steering.worker.plan.batches import Int32, StreamBatch
from steering.worker.step.contexts import LayerGroup, for_graphs, unsupported
from steering.worker.step.graph_inputs import (
    PIECES,
    Field,
    Shape,
    graph_shapes,
    host_inputs,
    piece_shapes,
)
from steering.worker.step.pieces import Pieces, left_out
from steering.worker.step.stream_graph import GroupInputs, Source, StreamGraph

_LOG = logging.getLogger(__name__)

RESERVE = 512 << 20
"""Bytes of the device that graphs leave free."""


class StreamGraphs:
    """The graphs of all streams.

    Args:
        runner: vLLM's, V2, after its KV cache was initialised.
        tables: per KV cache group ([≥ Q, B] int32 block table at a fixed place, tokens per block).
        kernel_block_sizes: per KV cache group, tokens per block as kernels see them.
        streams: [S].
        shapes: of the graphs.
    """

    def __init__(
        self,
        runner: Any,
        tables: Sequence[tuple[torch.Tensor, int]],
        kernel_block_sizes: Sequence[int],
        streams: Sequence[Source],
        shapes: Sequence[Shape],
    ) -> None:
        self._device: torch.device = runner.device
        self._config = for_graphs(runner.vllm_config, [s for s in shapes if s.width != PIECES])
        self._longest: int = runner.vllm_config.model_config.max_model_len
        self._layers = runner.vllm_config.compilation_config.static_forward_context
        self._tables, self._most = tables, max(shape.tokens for shape in shapes)
        self._inputs = self._new(len(streams), len(Field), self._most)
        self._step_ids = self._new(runner.vllm_config.scheduler_config.max_num_batched_tokens)
        # Where rows start, by their width.
        self._starts = {
            width: torch.arange(0, self._most + 1, width, dtype=torch.int32)
            for width in {shape.width for shape in shapes} - {PIECES}
        }
        self._starts_there = {w: starts.to(self._device) for w, starts in self._starts.items()}
        self._streams: dict[int, StreamGraph] = {}
        self._wanted: list[tuple[Shape, int]] = []
        self._left_out: list[str] = []
        pieces = any(shape.width == PIECES for shape in shapes)
        for i, source in enumerate(streams):
            groups = LayerGroup.all(runner, kernel_block_sizes, source.layers, self._config)
            for width in sorted({shape.width for shape in shapes}):
                if why := unsupported(groups, self._config, width):
                    how = "in pieces" if i in self._streams and pieces else "without"
                    self._left_out.append(f"stream {source.name!r} runs {how}: {why}")
                    break
                if i not in self._streams:
                    self._streams[i] = self._stream(i, source, groups)
                self._wanted += [(shape, i) for shape in shapes if shape.width == width]
        self.widest = max(shape.width or shape.rows for shape in shapes)
        """The most tokens of a row."""
        self.replays = dict.fromkeys(range(len(streams)), 0)
        """Passes that were replayed, by stream."""

    def _new(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _stream(self, i: int, source: Source, groups: Sequence[LayerGroup]) -> StreamGraph:
        most, own = self._most, []
        for group in groups:
            table, size = self._tables[group.kv_group]
            slots = torch.full((most,), PAD_SLOT_ID, dtype=torch.int64, device=self._device)
            own.append(GroupInputs(group, table, size, self._new(most, table.shape[1]), slots))
        read_as = source.read_as
        return StreamGraph(
            source.name,
            source.forward,
            None if read_as is None else read_as.to(self._device),
            own,
            self._inputs[i],
            self._new(most),
            self._new(most, dtype=torch.int64),
            self._new(most, dtype=torch.int64),
            self._new(most + 1),
            source.launching,
        )

    # --- before serving -------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, free: Callable[[], int] | None = None) -> None:
        """Captures, pieces last, else the largest first: smaller ones find room in their memory.

        Stops once less than `RESERVE` is free. Fewer rows are then padded up to the next size that
        there is, and streams without any run as they would without graphs.

        Args:
            free: bytes of the device that are free.
        """
        free = free or _free_memory
        before, left = free(), list(self._wanted)
        left.sort(key=lambda one: (one[0].width == PIECES, -one[0].tokens, one[1]))
        self._step_ids.zero_()
        with parallel_state.graph_capture(device=self._device):
            while left and free() >= RESERVE:
                shape, i = left.pop(0)
                self._capture(self._streams[i], shape)
        taken = (before - free()) / 2**20
        shapes = [shape for stream in self._streams.values() for shape in stream.graphs]
        count, pieces = len(shapes), sum(shape.width == PIECES for shape in shapes)
        _LOG.info(
            "graphs: %d of %d streams, %d of them in pieces, %.0f MiB taken",
            count, len(self._streams), pieces, taken,
        )  # fmt: skip
        for sentence in self._left_out:
            _LOG.warning("graphs: %s", sentence)
        if left:
            _LOG.warning(
                "graphs: %d of %d were left out, since less than %d MiB of the device are free: "
                "lower gpu_memory_utilization, max_num_seqs or cudagraph_capture_sizes",
                len(left), count + len(left), RESERVE >> 20,
            )  # fmt: skip

    def _capture(self, stream: StreamGraph, shape: Shape) -> None:
        stream.inputs.fill_(-1)
        stream.inputs[Field.LENGTH].fill_(shape.width)
        pool = current_platform.get_global_graph_pool()
        first = torch.cuda.CUDAGraph()
        stream.read(self._step_ids, shape)
        with self._context(stream, self._metadata(stream, shape, None), shape):
            found = self._forward(stream, shape)  # also what backends do once
        if stream.out is None:
            stream.out = found.new_zeros(self._most, found.shape[1])
        get_offloader().sync_prev_onload()
        with torch.cuda.graph(first, pool, stream=current_stream()):
            stream.read(self._step_ids, shape)
        second: Any = Pieces(pool) if shape.width == PIECES else torch.cuda.CUDAGraph()
        whole = partial(torch.cuda.graph, second, pool, stream=current_stream())
        captured = second.capturing if shape.width == PIECES else whole
        # The first pass may have changed what the builders hold.
        metadata = self._metadata(stream, shape, None)
        with self._context(stream, metadata, shape, second), captured():
            stream.out[: shape.tokens].copy_(self._forward(stream, shape))
            get_offloader().join_after_forward()
        stream.graphs[shape] = first, second

    # --- in a step ------------------------------------------------------------------------------

    def shape_for(
        self, i: int, batch: StreamBatch | None, *, exact: bool = False, whole: bool = False
    ) -> Shape | None:
        """The shape of the graph that is replayed for stream i's batch; None if there is none.

        Args:
            i: stream.
            batch: what it runs.
            exact: whether the graph's rows must have as many tokens.
            whole: whether it must not be in pieces.
        """
        if batch is None or i not in self._streams:
            return None
        width, rows, tokens = batch.width, batch.rows.size, batch.tokens.size
        graphs = self._streams[i].graphs
        shapes = [s for s in graphs if s.width >= width and s.rows >= rows]
        if exact:
            shapes = [s for s in shapes if s.width * rows == tokens]
        if not shapes and not whole:
            shapes = [s for s in graphs if s.width == PIECES and s.tokens >= tokens]
        return min(shapes, key=lambda s: s.tokens, default=None)

    def inputs(self, batches: Mapping[int, tuple[StreamBatch, Shape]], scratch: int) -> Int32:
        """As `host_inputs`, of these graphs' size."""
        return host_inputs(batches, scratch, len(self._inputs), self._most)

    def inputs_of(self, batch: StreamBatch, scratch: int) -> Int32:
        """[9, N] the same of one-token rows, which some stream will run later in the step."""
        one = batch, Shape(batch.rows.size, 1)
        return host_inputs({0: one}, scratch, 1, self._most)[0]

    def put(self, inputs: torch.Tensor, ids: torch.Tensor) -> None:
        """Puts what the graphs read in its place, before the passes of a step.

        Args:
            inputs: what `inputs` returned, on the device.
            ids: [T] int32 that `Field.TOKEN` counts in.
        """
        self._inputs.copy_(inputs, non_blocking=True)
        self._step_ids[: ids.shape[0]].copy_(ids)

    def put_later(self, i: int, inputs: torch.Tensor) -> None:
        """The same before another pass of stream i; of one batch, from `inputs_of`."""
        self._inputs[i].copy_(inputs)

    def put_own(self, i: int, ids: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Has stream i read other ids, which are its own, in place of the step's; of one-token
        rows.

        Args:
            i: stream.
            ids: [n] int32.
            positions: [n] int64 of the rows; None: as the host said.
        """
        rows, count = self._inputs[i], ids.shape[0]
        rows[Field.OWN_ID, :count].copy_(ids)
        if positions is not None:
            rows[Field.POSITION, :count].copy_(positions)
            torch.add(rows[Field.POSITION, :count], 1, out=rows[Field.LENGTH, :count])

    def run(self, i: int, batch: StreamBatch, shape: Shape) -> torch.Tensor:
        """[T_i, H] the hidden states of stream i's tokens; valid until the stream's next pass."""
        stream = self._streams[i]
        first, second = stream.graphs[shape]
        first.replay()
        # What a second graph reads of this lies in the builders' and our buffers.
        metadata = self._metadata(stream, shape, batch)
        get_offloader().sync_prev_onload()
        with stream.attending(metadata) if shape.width == PIECES else nullcontext():
            second.replay()
        self.replays[i] += 1
        assert stream.out is not None
        return stream.of(stream.out, batch, shape)

    def tokens(self, i: int, batch: StreamBatch, shape: Shape) -> torch.Tensor:
        """[T_i] int64 where stream i's tokens lie in the step, once they ran."""
        return self._streams[i].of(self._streams[i].tokens, batch, shape)

    def kept(self, i: int, buffer: torch.Tensor, batch: StreamBatch, shape: Shape) -> torch.Tensor:
        """[T_i, …] stream i's tokens, of a buffer into which its graph writes; once they ran."""
        return self._streams[i].of(buffer, batch, shape)

    def _forward(self, stream: StreamGraph, shape: Shape) -> torch.Tensor:
        with stream.launching():
            return stream.forward(stream.ids[: shape.tokens], stream.positions[: shape.tokens])

    def _metadata(self, stream: StreamGraph, shape: Shape, batch: StreamBatch | None) -> list[Any]:
        """Has the backends prepare themselves for a stream's batch; None: for the capture of a
        graph. Per group of layers, their metadata.
        """
        if shape.width == PIECES and batch is None:
            return [None] * len(stream.groups)  # attention is not run
        rows, found = self._rows(stream, shape, batch), []
        for group in stream.groups:
            common = CommonAttentionMetadata(
                **rows,
                block_table_tensor=group.blocks[: rows["num_reqs"]],
                slot_mapping=group.slots[: rows["num_actual_tokens"]],
            )
            attention = group.layers.attention
            build = attention.build_metadata
            if batch is None:
                build = attention.build_metadata_for_cudagraph_capture
            found.append(build(common))
        return found

    def _rows(self, stream: StreamGraph, shape: Shape, batch: StreamBatch | None) -> dict[str, Any]:
        """The metadata of the rows for attention backends; as for `_metadata`."""
        count, width = shape
        if width == PIECES:
            assert batch is not None
            return stream.rows_of(batch)
        ends = np.full(count, width if batch is None else 0, np.int32)
        if batch is not None:
            ends[: batch.rows.size] = batch.lengths
        return {
            "query_start_loc": self._starts_there[width][: count + 1],
            "query_start_loc_cpu": self._starts[width][: count + 1],
            "seq_lens": stream.inputs[Field.LENGTH, :count],
            "seq_lens_cpu_upper_bound": torch.from_numpy(ends),
            "num_reqs": count,
            "num_actual_tokens": shape.tokens,
            "max_query_len": width,
            # A graph must suit every step, so it is captured as if for the longest text.
            "max_seq_len": self._longest if batch is None else int(ends.max()),
        }

    @contextmanager
    def _context(
        self, stream: StreamGraph, metadata: Sequence[Any], shape: Shape, graph: Any = None
    ) -> Iterator[None]:
        """The forward context of a stream's layers, by the names that its model asks for, while
        a graph is captured; None: before it is.
        """
        built, slots, layers = {}, {}, {}
        for group, own in zip(stream.groups, metadata, strict=True):
            for kv_layer, name in group.layers.layers:
                built[name], slots[name] = own, group.slots[: shape.tokens]
                layers[name] = self._layers[kv_layer]
                if isinstance(graph, Pieces):
                    layers[name] = left_out(layers[name], name, graph)
        with set_forward_context(
            built,
            self._config,
            num_tokens=shape.tokens,
            slot_mapping=slots,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
        ):
            inner = copy(get_forward_context())
            inner.no_compile_layers = {**inner.no_compile_layers, **layers}
            with override_forward_context(inner):
                yield


def captured(
    runner: Any,
    tables: Sequence[tuple[torch.Tensor, int]] | None,
    kernel_block_sizes: Sequence[int],
    streams: Sequence[Source],
) -> StreamGraphs | None:
    """The graphs of an engine; None if it shall have none, or cannot.

    Args:
        runner: as for `StreamGraphs`.
        tables: likewise; None if they move from step to step.
        kernel_block_sizes: likewise.
        streams: likewise.
    """
    config = runner.vllm_config
    if not current_platform.support_static_graph_mode():
        return None
    if why := _none_at_all(config.model_config, tables):
        _LOG.warning("graphs: none of the streams has any: %s", why)
        return None
    asked = config.compilation_config.cudagraph_capture_sizes
    asked = asked or config.additional_config["coxswain"].get("graph_sizes")
    scheduler, drafts = config.scheduler_config, config.num_speculative_tokens
    rows, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    shapes = graph_shapes(asked, rows, tokens, drafts) + piece_shapes(asked, tokens)
    assert tables is not None
    found = StreamGraphs(runner, tables, kernel_block_sizes, streams, shapes)
    found.capture()
    return found


def _none_at_all(model: Any, tables: object) -> str:
    """Why no stream can be captured; '' if some may be."""
    if model.enforce_eager:
        return "enforce_eager is set"
    if tables is None:
        return "Model Runner V1 keeps no block tables at fixed places"
    return ""


def _free_memory() -> int:
    """Bytes of the current device that are free."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    free: int = torch.accelerator.get_memory_info()[0]
    return free
