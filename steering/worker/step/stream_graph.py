"""One stream's graphs, and the memory at fixed places that they read.

Letters: N tokens of the largest graph, Q requests of a step, B blocks per request.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from steering.worker.plan.batches import StreamBatch
from steering.worker.readout.overlaps import read_as
from steering.worker.step.contexts import LayerGroup
from steering.worker.step.graph_inputs import Field, Shape

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""([n] int32 ids, [n] int64 positions) → [n, H] hidden states."""


@dataclass(frozen=True)
class Source:
    """What a stream's graphs are made of.

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
    launching: Callable[[], AbstractContextManager[None]]
    out: torch.Tensor | None = None
    graphs: dict[Shape, tuple[Any, Any]] = field(default_factory=dict)

    def of(self, buffer: torch.Tensor, batch: StreamBatch, shape: Shape) -> torch.Tensor:
        """[T, …] a batch's tokens, of a buffer that has them as the graph does."""
        tokens = batch.tokens.size
        if tokens == batch.rows.size * shape.width:
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
            written = p.view(count, -1) // group.size
            block = torch.where(scratch >= 0, scratch, blocks.gather(1, written))
            group.blocks[:count].copy_(blocks.scatter(1, written, block))
            slots = block.flatten().long() * group.size + p % group.size
            group.slots[:size].copy_(torch.where(position >= 0, slots, PAD_SLOT_ID))
