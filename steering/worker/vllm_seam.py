"""The seam to vLLM's model runner: the only file that touches its internals, but for LoRA.

Checked on vLLM 0.32.0, Model Runner V1 (CPU build). Another runner needs another seam; the rest
of `steering.worker` does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import (
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steering.refused import GRAPHS, graphs_of
from steering.wire import Freight, unpack
from steering.worker.batches import Candidates, Step, StreamBatch
from steering.worker.values import broadcast, gather
from steering.worker.watch import Watch


@dataclass(frozen=True)
class _LayerGroup:
    """Layers of one stream that share attention metadata: (KV layer, name it is asked for by)."""

    kv_group: int
    attention: Any
    layers: tuple[tuple[str, str], ...]


class Seam:
    """Reads a V1 model runner during a step, and runs streams in contexts of their own.

    Args:
        runner: the worker's model runner, after its KV cache was initialised.
        streams: per stream, KV layer name → name under which its module asks for the layer.
    """

    def __init__(self, runner: Any, streams: list[dict[str, str]]) -> None:
        _check(runner)
        self._runner = runner
        self._groups = [self._layer_groups(layers) for layers in streams]
        self._held: set[str] = set()
        self._scratch: dict[int, int] = {}
        self._built: tuple[StreamBatch, tuple[int, int], tuple[Any, torch.Tensor]] | None = None
        self._twin = [any(kv != name for kv, name in layers.items()) for layers in streams]

    def _layer_groups(self, layers: dict[str, str]) -> list[_LayerGroup]:
        found = []
        for kv_group, groups in enumerate(self._runner.attn_groups):
            for group in groups:
                pairs = tuple((n, layers[n]) for n in group.layer_names if n in layers)
                if pairs:
                    found.append(_LayerGroup(kv_group, group, pairs))
        return found

    @property
    def scheduled(self) -> bool:
        """False in vLLM's dummy and profiling runs, which have no requests."""
        return bool(get_forward_context().attn_metadata)

    def request_ids(self) -> list[str]:
        """Ids of this step's requests, in batch order."""
        ids: list[str] = self._runner.input_batch.req_ids
        return ids

    def freight(self, request_id: str) -> tuple[Freight | None, int, set[int]]:
        """(what a request carries, its prompt length in tokens without an earlier reply, ids that
        end its text).
        """
        request = self._runner.requests[request_id]
        params = request.sampling_params
        freight = unpack(params.extra_args)
        stops = {*(params.stop_token_ids or ()), *params.all_stop_token_ids}
        return freight, request.num_prompt_tokens - (freight.reply if freight else 0), stops

    def step(self) -> Step:
        """What vLLM scheduled in this step."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        return Step(
            self._runner.query_start_loc.np[: count + 1],
            batch.num_computed_tokens_cpu[:count],
        )

    def samples(self, row: int) -> bool:
        """Whether this step draws a token for a row (False inside a chunked prompt)."""
        return not self._runner.discard_request_mask.np[row]

    def drafts(self, row: int) -> int:
        """How many drafts of a row this step verifies: its last tokens."""
        if self._runner.speculative_config is None:
            return 0
        return max(0, int(self._runner.num_decode_draft_tokens.np[row]))

    def token(self, row: int, index: int) -> int:
        """Token `index` of a row's request, counted from the start of its prompt; or a draft."""
        return int(self._runner.input_batch.token_ids_cpu[row, index])

    def drawn(self, row: int, start: int) -> list[int]:
        """The tokens of a row's request from `start` on, without this step's drafts."""
        batch = self._runner.input_batch
        found: list[int] = batch.token_ids_cpu[row, start : batch.num_tokens_no_spec[row]].tolist()
        return found

    def hold_generators(self) -> None:
        """Keeps the random generators of rows that draw no token in this step out of the sampler.

        vLLM lets such rows (chunks of a prompt) draw all the same and then rewinds their
        generators, which a CPU generator cannot do: one request with a seed and a long prompt
        ended the engine.
        """
        batch = self._runner.input_batch
        if self._runner.device.type != "cpu" or not (batch.generators or self._held):
            return
        discarded = self._runner.discard_request_mask.np
        for row in [row for row in batch.generators if discarded[row]]:
            del batch.generators[row]
            self._held.add(batch.req_ids[row])
        for request_id in list(self._held):
            row = batch.req_id_to_index.get(request_id)
            if request_id not in self._runner.requests:
                self._held.remove(request_id)
            elif row is not None and not discarded[row]:
                self._held.remove(request_id)
                batch.generators[row] = self._runner.requests[request_id].generator

    @contextmanager
    def stream_context(self, stream: int, batch: StreamBatch | None) -> Iterator[None]:
        """Makes the stream's attention layers see `batch`; None is the step as scheduled.

        Both the metadata and the context's slot mapping are swapped: the KV write takes its
        slots from the latter.
        """
        if batch is None and not self._twin[stream]:
            yield
            return
        outer = get_forward_context()
        inner = copy(outer)
        inner.attn_metadata = dict(outer.attn_metadata)
        inner.slot_mapping = dict(outer.slot_mapping)
        inner.no_compile_layers = dict(outer.no_compile_layers)
        for group in self._groups[stream]:
            if batch is not None:
                metadata, slots = self._build(group, batch, self._scratch.get(stream, 0))
            for kv_layer, name in group.layers:
                if batch is None:
                    metadata = outer.attn_metadata[kv_layer]
                    slots = outer.slot_mapping[kv_layer]
                inner.attn_metadata[name] = metadata
                inner.slot_mapping[name] = slots
                inner.no_compile_layers[name] = outer.no_compile_layers[kv_layer]
        if batch is not None:
            # Captured graphs have the step's padded shape; a stream batch has its own.
            inner.cudagraph_runtime_mode = CUDAGraphMode.NONE
            inner.batch_descriptor = None
        with override_forward_context(inner):
            yield

    @contextmanager
    def between_steps(self, stream: int, batch: StreamBatch) -> Iterator[None]:
        """Makes the stream's attention layers see `batch` behind a step; not for a twin."""
        metadata, mapping = {}, {}
        for group in self._groups[stream]:
            built, slots = self._build(group, batch, 0)
            for name, _ in group.layers:
                metadata[name], mapping[name] = built, slots
        config, size = self._runner.vllm_config, batch.tokens.size
        with set_forward_context(metadata, config, num_tokens=size, slot_mapping=mapping):
            yield

    def add_scratch(self, stream: int, blocks: int) -> None:
        """Gives a stream's KV layers blocks behind those that vLLM manages; before any request.

        Raises:
            ValueError: the attention backend does not keep its cache block by block.
        """
        layers = self._runner.vllm_config.compilation_config.static_forward_context
        for group in self._groups[stream]:
            for name, _ in group.layers:
                old = layers[name].kv_cache
                new = old.new_zeros(old.shape[0] + blocks, *old.shape[1:])
                if old.shape[0] % self._runner.kv_cache_config.num_blocks:
                    raise ValueError(
                        f"value streams need a cache that lies block by block; {name} has shape "
                        f"{list(old.shape)}"
                    )
                self._scratch[stream] = old.shape[0]
                layers[name].kv_cache = new
                # Else the old tensor would stay in memory.
                caches = self._runner.kv_caches
                for i, cache in enumerate(caches):
                    if cache.data_ptr() == old.data_ptr():
                        caches[i] = new

    def begin_candidates(self, stream: int, batch: Candidates) -> None:
        """Copies the begun blocks of the candidates' prefixes into their scratch blocks."""
        layers = self._runner.vllm_config.compilation_config.static_forward_context
        for group in self._groups[stream]:
            table = self._runner.input_batch.block_table[group.kv_group]
            begun = batch.begun(table.block_table.np, table.block_size)
            spread = broadcast if self._runner.device.type == "cpu" else gather
            for name, _ in group.layers if begun else ():
                cache = layers[name].kv_cache
                spread(cache, cache[self._scratch[stream] :], begun)

    def _build(
        self, group: _LayerGroup, batch: StreamBatch, scratch: int
    ) -> tuple[Any, torch.Tensor]:
        """(attention metadata, slots) of a batch: the same for streams that share both."""
        key = id(group.attention), scratch
        if self._built is None or self._built[0] is not batch or self._built[1] != key:
            self._built = batch, key, self._build_new(group, batch, scratch)
        return self._built[2]

    def _build_new(
        self, group: _LayerGroup, batch: StreamBatch, scratch: int
    ) -> tuple[Any, torch.Tensor]:
        managed = self._runner.input_batch.block_table[group.kv_group]
        blocks = batch.table(managed.block_table.np, managed.block_size, scratch)
        slots = self.to_device(batch.slots(blocks, managed.block_size))
        starts = torch.from_numpy(batch.starts)
        lengths = torch.from_numpy(batch.lengths)
        common = CommonAttentionMetadata(
            query_start_loc=self.to_device(batch.starts),
            query_start_loc_cpu=starts,
            seq_lens=self.to_device(batch.lengths),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=batch.rows.size,
            num_actual_tokens=batch.tokens.size,
            max_query_len=int(np.diff(batch.starts).max()),
            max_seq_len=int(batch.lengths.max()),
            block_table_tensor=self.to_device(blocks),
            slot_mapping=slots,
        )
        return group.attention.build_metadata(common), slots

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A host array on the model's device."""
        return torch.from_numpy(array).to(self._runner.device, non_blocking=True)


def tell_faults(runner: Any, watch: Watch) -> None:
    """Sends what a step's rows are flagged with to the scheduler, beside the drawn tokens.

    vLLM has a place for the number of NaNs in a request's scores; the flag goes there, to
    `SteeredScheduler`. The sampler is made to show what constraints left of each row.

    Args:
        runner: the worker's model runner.
        watch: has the flags.
    """
    keep, constrain = runner._bookkeeping_sync, runner.sampler.apply_logits_processors

    def constrained(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        left: torch.Tensor = constrain(logits, *args, **options)
        if left.shape[0] == runner.input_batch.num_reqs:
            watch.left(left)
        return left

    def with_flags(*args: Any, **options: Any) -> Any:
        kept = keep(*args, **options)
        ids = runner.input_batch.req_ids
        flags = {i: flag for i, flag in watch.take().items() if i < len(ids)}
        for row in watch.at_fault:
            _clean(runner, row)
        return ({ids[i]: flag for i, flag in flags.items()}, *kept[1:])

    runner._bookkeeping_sync = with_flags
    runner.sampler.apply_logits_processors = constrained


def _clean(runner: Any, row: int) -> None:
    """Puts zeros where a request's blocks hold no numbers.

    The blocks go to others next, and attention kernels multiply what they may not see by 0: of NaN
    that makes NaN, also far behind a request's last token.

    Args:
        runner: the worker's model runner.
        row: of the request in the step.
    """
    blocks = runner.kv_cache_config.num_blocks
    layers = runner.vllm_config.compilation_config.static_forward_context.values()
    found = (getattr(layer, "kv_cache", None) for layer in layers)
    caches = {c.data_ptr(): c for c in found if isinstance(c, torch.Tensor)}
    tables = [runner.input_batch.block_table[g] for g in range(len(runner.attn_groups))]
    rows = [t.block_table.np[row, : t.num_blocks_per_row[row]] for t in tables]
    own = torch.from_numpy(np.unique(np.concatenate(rows)).astype(np.int64))
    for cache in caches.values():
        if not cache.is_floating_point() or cache.itemsize < 2:
            continue
        if cache.device.type == "cpu" and cache.shape[0] >= blocks:
            cache[own] = cache[own].nan_to_num(0.0, 0.0, 0.0)
        else:  # backends lay blocks out as they like
            cache.nan_to_num_(0.0, 0.0, 0.0)


def _check(runner: Any) -> None:
    """Whether an engine is one that the streams can be bound to.

    Raises:
        ValueError: it would answer wrongly; the message says why.
    """
    if not isinstance(runner, GPUModelRunner):
        raise ValueError(
            f"the streams need vLLM's model runner V1, and this engine has {type(runner).__name__} "
            f"of {type(runner).__module__}: set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if (mode := graphs_of(runner.compilation_config)) != "NONE":
        raise ValueError(f"compilation_config.cudagraph_mode: refused (got {mode}): {GRAPHS}")


def choice_of(request_id: str) -> str:
    """The choice index of a request: vLLM names the children of `n > 1` '<index>_<id>'."""
    head, found, _ = request_id.partition("_")
    return head if found and head.isdigit() else "0"
