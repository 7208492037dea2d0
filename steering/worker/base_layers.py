"""What loading an adapter asks of the base's own layers: products, row norms and biases.

The layers of vLLM are asked through their own quantisation method, so packed, fused and quantised
weights are read as they run. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from adapters.errors import DoesNotFit
from steering.worker.adapter_layers import Slice, by_checkpoint_name, check_slice, slices

CHUNK = 128
"""Columns of W that are read at a time."""


class EngineLayers:
    """The linear layers of one stream, by the names of its checkpoint: `BaseLayers` of adapters.

    Args:
        manager: of vLLM's slots, its layers wrapped.
        stream: one that owns its weights.
        norms: layer → the row norms that were found before; grows.
    """

    def __init__(self, manager: Any, stream: str, norms: dict[str, torch.Tensor]) -> None:
        self._manager, self._stream, self._norms = manager, stream, norms
        self._model = manager.model.get_submodule(stream)
        self._known = slices(manager, stream)

    def slice(self, module: str) -> Slice:
        """Where a module of the checkpoint lies.

        Raises:
            DoesNotFit: the engine has no such layer, or cannot adapt it.
        """
        part = by_checkpoint_name(self._model, self._known, self._stream, module)
        return check_slice(part, self._stream, module, self._known)

    def layer(self, part: Slice) -> Any:
        """The wrapped layer that a module is in."""
        return self._manager.modules[part.layer]

    def linear(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a layer, None if the engine cannot adapt one of this name.

        Raises:
            DoesNotFit: it belongs to an expert.
        """
        part = by_checkpoint_name(self._model, self._known, self._stream, module)
        if part is None and "expert" in module:
            check_slice(part, self._stream, module, self._known)
        return None if part is None else (part.out, part.into)

    def product(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """[n, out] x Wᵀ without bias, float32; rounded as the engine rounds it.

        Args:
            module: as in the checkpoint.
            x: [n, in].

        Raises:
            DoesNotFit: the engine has no such layer, or only a part of it.
        """
        part = self._whole(module)
        return self._own(part, _apply(self.layer(part), x)).float()

    def row_norms(self, module: str) -> torch.Tensor:
        """[out] ‖W‖₂ of each row, not squared, float32; kept once it was found.

        Raises:
            DoesNotFit: as `product`; or W cannot be read by products with it.
        """
        for _ in self.measure(module):
            pass
        part = self._whole(module)
        return self._own(part, self._norms[part.layer])

    def measure(self, module: str) -> Iterator[None]:
        """Finds the row norms of a module, unless they are known; yields between bits of work."""
        part = self._whole(module)
        if part.layer in self._norms:
            return
        squares = torch.zeros(1, dtype=torch.float64)
        for more in _squares(self.layer(part)):
            squares = squares + more.cpu()
            yield
        self._norms[part.layer] = squares.sqrt().float()

    def bias(self, module: str) -> torch.Tensor | None:
        """[out] b0, float32; None if the layer has none.

        Raises:
            DoesNotFit: as `product`.
        """
        part = self._whole(module)
        bias = self.layer(part).base_layer.bias
        return None if bias is None else self._own(part, bias.detach()).float()

    def _whole(self, module: str) -> Slice:
        part = self.slice(module)
        if get_tensor_model_parallel_world_size() > 1:
            why = "DoRA, and biases instead of the base's, are not served under tensor parallelism"
            raise DoesNotFit(why, field=f"{self._stream}: {module}")
        return part

    def _own(self, part: Slice, found: torch.Tensor) -> torch.Tensor:
        """A module's [..., out] of its layer's, in the checkpoint's order; on the CPU."""
        own = found[..., part.start : part.start + part.out].cpu()
        if part.order is None:
            return own
        sorted_ = torch.empty_like(own)
        sorted_[..., part.order] = own
        return sorted_


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[n, out] x Wᵀ in the engine's dtype, of a wrapped layer."""
    base = layer.base_layer
    made: torch.Tensor = base.quant_method.apply(base, x.to(layer.device, base.params_dtype))
    return made


def _squares(layer: Any) -> Iterator[torch.Tensor]:
    """Parts of [out] ‖W‖² of each row, float64, which are to be added.

    Raises:
        DoesNotFit: W cannot be read by products with it.
    """
    base = layer.base_layer
    weight, into = getattr(base, "weight", None), base.input_size
    plain = isinstance(base.quant_method, UnquantizedLinearMethod)
    if plain and weight is not None and weight.shape == (base.output_size, into):
        for columns in weight.detach().split(CHUNK, 1):
            yield columns.double().square().sum(1)
        return
    # The CPU build packs weights for its own kernels and drops them; others are quantised.
    for start in range(0, into, CHUNK):
        one = torch.zeros(min(CHUNK, into - start), into)
        one[:, start : start + CHUNK].fill_diagonal_(1)
        columns = _apply(layer, one).double()
        if not start:
            _check_linear(layer, one, columns)
        yield columns.square().sum(0)


def _check_linear(layer: Any, one: torch.Tensor, columns: torch.Tensor) -> None:
    """A fixed scale of the activations shows: it does not hold 1 and 0.75 alike."""
    other = _apply(layer, 0.75 * one).double() / 0.75
    rounding = torch.finfo(layer.base_layer.params_dtype).eps + 1e-4
    if not (other - columns).abs().max() <= rounding * columns.abs().max():
        raise DoesNotFit(
            "the base's layer quantises its input with a fixed scale, so its weights cannot be read"
            " by products with it",
            field=str(getattr(layer.base_layer, "prefix", type(layer).__name__)),
        )
