"""One stream's graphs, and the memory at fixed places that they read.

Letters: N tokens of the largest graph, Q requests of a step, B blocks per request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from steering.worker.plan.batches import StreamBatch
from steering.worker.readout.overlaps import read_as
from steering.worker.step.contexts import LayerGroup
from steering.worker.step.graph_inputs import PIECES, Field, Shape

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""([n] int32 ids, [n] int64 positions) → [n, H] hidden states."""


@dataclass(frozen=True)
class Source:
    """The parts that a stream's graphs are made from.

    Args:
        name: its name.
        forward: its model.
        layers: KV layer → name under which the model asks for it.
        read_as: [V] int64 its id for each of the base's; None where they are alike.
        launching: makes layers launch the adapters' kernels.
    """

    name: str
    forward: Forward
    layers: dict[str, str]
    read_as: torch.Tensor | None
    launching: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class GroupInputs:
    """A stream's layers that share attention metadata, and what they read.

    Args:
        layers: with builders that only this stream's graphs use.
        table: [≥ Q, B] int32 vLLM's block table of each step.
        size: tokens per block.
        blocks: [N, B] int32 the rows' blocks.
        slots: [N] int64 the tokens' KV slots.
    """

    layers: LayerGroup
    table: torch.Tensor
    size: int
    blocks: torch.Tensor
    slots: torch.Tensor


@dataclass
class StreamGraph:
    """One stream: its buffers, which stay where they are, and its graphs."""

    name: str
    forward: Forward
    read_as: torch.Tensor | None
    groups: list[GroupInputs]
    inputs: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor
    launching: Callable[[], AbstractContextManager[None]]
    out: torch.Tensor | None = None
    graphs: dict[Shape, tuple[Any, Any]] = field(default_factory=dict)

    def of(self, buffer: torch.Tensor, batch: StreamBatch, shape: Shape) -> torch.Tensor:
        """[T, …] a batch's tokens, of a buffer that has them as the graph does."""
        tokens = batch.tokens.size
        if shape.width == PIECES or tokens == batch.rows.size * shape.width:
            return buffer[:tokens]
        return buffer[self.inputs[Field.PLACE, :tokens].long()]

    def read(self, step_ids: torch.Tensor, shape: Shape) -> None:
        """Makes of the inputs what the model and its attention backends read.

        Args:
            step_ids: [T] int32 that `Field.TOKEN` counts in.
            shape: of the graph.
        """
        count, size = shape.rows, shape.tokens
        rows, of_tokens = self.inputs[:, :count], self.inputs[:, :size]
        tokens = of_tokens[Field.TOKEN].clamp(min=0).long()
        own, position = of_tokens[Field.OWN_ID], of_tokens[Field.POSITION].long()
        ids = read_as(step_ids[tokens], self.read_as)
        self.tokens[:size].copy_(tokens)
        self.ids[:size].copy_(torch.where(own >= 0, own, ids))
        self.positions[:size].copy_(position.clamp(min=0))
        requests, scratch = rows[Field.REQUEST].clamp(min=0).long(), rows[Field.BLOCK, :, None]
        for group in self.groups:
            blocks, p = group.table[requests], position.clamp(min=0)
            written = p // group.size
            if shape.width == PIECES:
                block = blocks[of_tokens[Field.ROW].clamp(min=0).long(), written]
            else:
                written = written.view(count, -1)
                own = torch.where(scratch >= 0, scratch, blocks.gather(1, written))
                blocks, block = blocks.scatter(1, written, own), own.flatten()
            group.blocks[:count].copy_(blocks)
            slots = block.long() * group.size + p % group.size
            group.slots[:size].copy_(torch.where(position >= 0, slots, PAD_SLOT_ID))
        if shape.width == PIECES:
            self.starts[1 : count + 1].copy_(rows[Field.END])

    def rows_of(self, batch: StreamBatch) -> dict[str, Any]:
        """The metadata of a pass in pieces for attention backends."""
        count = batch.rows.size
        return {
            "query_start_loc": self.starts[: count + 1],
            "query_start_loc_cpu": torch.from_numpy(batch.starts),
            "seq_lens": self.inputs[Field.LENGTH, :count],
            "seq_lens_cpu_upper_bound": torch.from_numpy(batch.lengths),
            "num_reqs": count,
            "num_actual_tokens": batch.tokens.size,
            "max_query_len": batch.width,
            "max_seq_len": int(batch.lengths.max()),
        }

    @contextmanager
    def attending(self, metadata: Sequence[Any]) -> Iterator[None]:
        """The forward context of attention between pieces; its metadata, per group of layers."""
        inner = copy(get_forward_context())
        inner.attn_metadata = {
            name: own
            for group, own in zip(self.groups, metadata, strict=True)
            for _, name in group.layers.layers
        }
        with override_forward_context(inner):
            yield
