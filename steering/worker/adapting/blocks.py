"""The outputs of decoder layers as layers that adapters change: the residual stream.

vLLM's layers return a tensor, or two whose sum is the state; a delta goes onto the first alone, so
that the sum stays where vLLM has it, in the norm behind. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from adapters.formats.blocks import block
from adapters.kernels.gated import CONSTANTS, NOTHING, PRODUCTS
from steering.families import BLOCKS, Boundary


@dataclass(frozen=True)
class Identity:
    """What stands for a linear layer of vLLM.

    Args:
        input_size: H.
        output_size: H.
    """

    input_size: int
    output_size: int
    bias: None = None
    skip_bias_add: bool = False
    tp_rank: int = 0


class BlockOutput(nn.Module):
    """Adapts the output of one decoder layer, as vLLM's wrappers adapt linear layers.

    Args:
        size: H.
        slots: of the engine.
        rank: rank indices of a slot.
        dtype: of the weights.
        device: that the layer runs on.
        number: of the layer.
    """

    punica_wrapper = None

    def __init__(
        self,
        size: int,
        slots: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        number: int,
    ) -> None:
        super().__init__()
        self.number = number
        self.base_layer = Identity(size, size)
        self.device, self.output_slices = device, (size,)
        zeros = torch.zeros(slots, 1, rank, size, dtype=dtype, device=device)
        self.lora_a_stacked = (zeros,)
        self.lora_b_stacked = (zeros.mT.contiguous(),)
        self.filled = torch.zeros(slots, dtype=torch.int8)

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Fills a slot with A [r, H] and B [H, R]."""
        self.reset_lora(index)
        self.lora_a_stacked[0][index, 0, : lora_a.shape[0]].copy_(lora_a, non_blocking=True)
        self.lora_b_stacked[0][index, 0, :, : lora_b.shape[1]].copy_(lora_b, non_blocking=True)
        self.filled[index] = PRODUCTS if lora_a.any() else CONSTANTS

    def reset_lora(self, index: int) -> None:
        """Clears a slot."""
        if self.filled[index] != NOTHING:
            self.lora_a_stacked[0][index] = 0
            self.lora_b_stacked[0][index] = 0
            self.filled[index] = NOTHING

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Adds to `hidden` [T, H] in place; the state is `hidden`, or `hidden + residual`."""
        a, b = list(self.lora_a_stacked), list(self.lora_b_stacked)
        torch.ops.coxswain.residual_sum(hidden, residual, a, b, self.filled, self.number)


def adapt_blocks(model: Any, slots: int, rank: int, dtype: torch.dtype) -> dict[str, BlockOutput]:
    """Makes the decoder layers of a model adaptable, if how its family hands states on is known.

    Args:
        model: of a stream.
        slots: of the engine.
        rank: rank indices of a slot.
        dtype: of the slots.

    Returns:
        Module (`adapters.formats.blocks`) → what adapts it.
    """
    found: dict[str, BlockOutput] = {}
    for name, layer in model.named_modules():
        kind, number = type(layer), name.rsplit(".", 1)[-1]
        boundary = BLOCKS.get(f"{kind.__module__.split('.')[0]}.{kind.__name__}")
        if boundary is None or not number.isdecimal() or isinstance(layer, PPMissingLayer):
            continue
        device = next(layer.parameters()).device
        config: Any = model.config
        size: int = config.hidden_size
        output = BlockOutput(size, slots, rank, dtype, device, int(number))
        found[block(int(number))] = output
        layer.block_output = output
        layer.register_forward_hook(_HOOKS[boundary])
    return found


def _add_to_sum(layer: Any, _: Any, output: Any) -> Any:
    hidden, residual = output
    layer.block_output(hidden, residual)
    return hidden, residual


def _add_to_first(layer: Any, _: Any, output: Any) -> Any:
    layer.block_output(output[0], None)
    return output


def _add_to_whole(layer: Any, _: Any, output: Any) -> Any:
    # The models of `transformers` have a dimension for the batch.
    layer.block_output(output.flatten(0, -2), None)
    return output


_HOOKS = {
    Boundary.SUM: _add_to_sum,
    Boundary.FIRST: _add_to_first,
    Boundary.WHOLE: _add_to_whole,
}
