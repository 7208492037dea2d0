"""Forward contexts of the streams: what their attention layers see, and where they write.

vLLM gives a step one context, for the tokens as it scheduled them. A stream that runs other
tokens, or a twin, gets a context of its own, with attention metadata from builders of its own: a
builder may keep what it has built last.

Checked on vLLM 0.32.0, Model Runners V1 and V2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import (
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from steering.worker.plan.batches import Candidates
from steering.worker.plan.staging import StagedBatch
from steering.worker.step.graph_inputs import PIECES, Shape
from steering.worker.step.values import broadcast, gather

BlockTable = Callable[[int], tuple[torch.Tensor, int]]
"""KV cache group → ([Q, B] int32 block ids of the step's requests, tokens per block)."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one stream that share attention metadata.

    Args:
        kv_group: index of their KV cache group.
        attention: vLLM's group, with builders that only this stream uses.
        shared: names vLLM's group that the copy was made of, which streams may share.
        layers: (KV layer, name under which the stream's model asks for it).
    """

    kv_group: int
    attention: Any
    shared: int
    layers: tuple[tuple[str, str], ...]

    @classmethod
    def all(
        cls,
        runner: Any,
        kernel_block_sizes: Sequence[int],
        layers: dict[str, str],
        config: VllmConfig | None = None,
    ) -> list[LayerGroup]:
        """The groups of one stream.

        Args:
            runner: vLLM's model runner, after its KV cache was initialised.
            kernel_block_sizes: per KV cache group, tokens per block as kernels see them.
            layers: KV layer → name under which the stream's model asks for it.
            config: that the builders see; None: the engine's.
        """
        config = config or runner.vllm_config
        groups = []
        for kv_group, of_group in enumerate(runner.attn_groups):
            for group in of_group:
                pairs = tuple((n, layers[n]) for n in group.layer_names if n in layers)
                if not pairs:
                    continue
                own = replace(group, layer_names=[n for n, _ in pairs], metadata_builders=[])
                size = kernel_block_sizes[kv_group] if kv_group < len(kernel_block_sizes) else None
                own.create_metadata_builders(config, runner.device, size)
                groups.append(cls(kv_group, own, id(group), pairs))
        return groups


class StreamContexts:
    """Makes the layers of a stream see one of its batches.

    Args:
        runner: vLLM's model runner, after its KV cache was initialised.
        kernel_block_sizes: per KV cache group, tokens per block as kernels see them.
        streams: per stream, KV layer → name under which its model asks for the layer.
        block_table: of the current step.
        scratch: how many of the last KV blocks are for candidates.
    """

    def __init__(
        self,
        runner: Any,
        kernel_block_sizes: Sequence[int],
        streams: Sequence[dict[str, str]],
        block_table: BlockTable,
        scratch: int = 0,
    ) -> None:
        self._config: VllmConfig = runner.vllm_config
        self._runner, self._block_table = runner, block_table
        self._groups = [LayerGroup.all(runner, kernel_block_sizes, of) for of in streams]
        self._twin = [any(kv != name for kv, name in layers.items()) for layers in streams]
        self.device: torch.device = runner.device
        self.scratch: int = runner.kv_cache_config.num_blocks - scratch
        self._built: tuple[StagedBatch, int, tuple[Any, torch.Tensor]] | None = None

    @contextmanager
    def step(self, stream: int, batch: StagedBatch | None) -> Iterator[None]:
        """Inside a step, makes a stream's layers see `batch`; None is the step as scheduled.

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
                metadata, slots = self._build(group, batch)
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
    def between_steps(self, stream: int, batch: StagedBatch) -> Iterator[None]:
        """The same behind a step, where vLLM has no context; not for a twin."""
        metadata, mapping = {}, {}
        for group in self._groups[stream]:
            built, slots = self._build(group, batch)
            for name, _ in group.layers:
                metadata[name], mapping[name] = built, slots
        size = batch.host.tokens.size
        with set_forward_context(metadata, self._config, num_tokens=size, slot_mapping=mapping):
            yield

    def begin_candidates(self, stream: int, batch: StagedBatch) -> None:
        """Copies the begun blocks of the candidates' prefixes into their scratch blocks.

        Raises:
            ValueError: the cache does not lie block by block.
        """
        layers = self._config.compilation_config.static_forward_context
        candidates, blocks = batch.host, self._runner.kv_cache_config.num_blocks
        assert isinstance(candidates, Candidates)
        for group in self._groups[stream]:
            table, size = self._block_table(group.kv_group)
            begun = candidates.begun(size)
            for name, _ in group.layers if begun else ():
                cache = layers[name].kv_cache
                if cache.shape[0] != blocks:
                    raise ValueError(
                        f"value streams need a cache that lies block by block; {name} has shape "
                        f"{list(cache.shape)}, and there are {blocks} blocks"
                    )
                scratch = cache[self.scratch :]
                if cache.device.type == "cpu":
                    ids = table.numpy()
                    broadcast(cache, scratch, [(run, int(ids[q, b])) for run, q, b in begun])
                else:
                    gather(cache, scratch, table[batch.rows, batch.positions // size].long())

    def _build(self, group: LayerGroup, batch: StagedBatch) -> tuple[Any, torch.Tensor]:
        """(attention metadata, slots) of a batch: the same for streams that share both.

        The builder that built it keeps it until its stream's next batch, which is after all
        streams that share this one have run.
        """
        if self._built is None or self._built[0] is not batch or self._built[1] != group.shared:
            self._built = batch, group.shared, self._build_new(group, batch)
        return self._built[2]

    def _build_new(self, group: LayerGroup, batch: StagedBatch) -> tuple[Any, torch.Tensor]:
        table, size = self._block_table(group.kv_group)
        blocks, host = batch.blocks(table, size, self.scratch), batch.host
        slots = batch.slots(blocks, size)
        common = CommonAttentionMetadata(
            query_start_loc=batch.starts,
            query_start_loc_cpu=torch.from_numpy(host.starts),
            seq_lens=batch.lengths,
            seq_lens_cpu_upper_bound=torch.from_numpy(host.lengths),
            num_reqs=host.rows.size,
            num_actual_tokens=host.tokens.size,
            max_query_len=int(np.diff(host.starts).max()),
            max_seq_len=int(host.lengths.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
        )
        return group.attention.build_metadata(common), slots


def for_graphs(config: VllmConfig, shapes: Sequence[Shape]) -> VllmConfig:
    """The engine's configuration as attention backends must see it to prepare for replays.

    Without a graph mode FlashAttention and FlashInfer build some of their metadata in memory that
    nobody holds, which a graph would go on reading.
    """
    found, compilation = copy(config), copy(config.compilation_config)
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    compilation.cudagraph_capture_sizes = sorted({shape.tokens for shape in shapes})
    compilation.max_cudagraph_capture_size = max(shape.tokens for shape in shapes)
    found.compilation_config = compilation
    return found


def unsupported(groups: Sequence[LayerGroup], config: VllmConfig, width: int = 1) -> str:
    """Why a stream's pass over rows of `width` tokens cannot be captured; '' if it can.

    In pieces, with which attention is not, it always can where all that a layer keeps is KV.
    """
    if not groups:
        return "it has no attention layers"
    least = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    if width > 1:
        least = AttentionCGSupport.UNIFORM_BATCH
    for group in groups:
        spec = group.attention.kv_cache_spec
        if not hasattr(spec, "head_size"):
            return "some of its layers keep a state"
        if width == PIECES:
            continue
        builder = type(group.attention.get_metadata_builder())
        if builder.get_cudagraph_support(config, spec).value < least.value:
            rows = "" if width == 1 else f" over rows of {width} tokens"
            return f"{group.attention.backend.get_name()} cannot be captured{rows}"
    return ""
