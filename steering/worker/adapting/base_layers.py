"""What loading an adapter asks of the base's own layers: products, row norms and biases.

The layers of vLLM are asked through their own quantisation method, so packed, fused and quantised
weights are read as they run.

Under tensor parallelism a rank has some rows of W, or some columns. Of rows that it lacks, it needs
to know nothing: it drops what an adapter does to them. What it finds of some columns is added up
over the ranks, so all of them must ask for the same, in `ranks.together`.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from adapters.errors import DoesNotFit
from steering.worker import ranks
from steering.worker.adapting.layers import Slice, by_checkpoint_name, check_slice, slices

CHUNK = 128
"""Columns of W that are read at a time."""


class EngineLayers:
    """The linear layers of one stream, by the names of its checkpoint: `BaseLayers` of adapters.

    Rows that lie on other ranks have the product 0, the norm 1 and the bias 0.

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
            DoesNotFit: the engine has no such layer.
        """
        part = self.slice(module)
        layer = self.layer(part)
        if ranks.sees_a_part(layer.base_layer):
            found = ranks.added_up(_apply(layer, _own_inputs(layer, x)).float())
        else:
            found = _apply(layer, x).float()
        return self._own(part, found, 0)

    def row_norms(self, module: str) -> torch.Tensor:
        """[out] ‖W‖₂ of each row, not squared, float32; kept once it was found.

        Raises:
            DoesNotFit: as `product`; or W cannot be read by products with it.
        """
        for _ in self.measure(module):
            pass
        part = self.slice(module)
        return self._own(part, self._norms[part.layer], 1)

    def measure(self, module: str) -> Iterator[None]:
        """Finds the row norms of a module, unless they are known; yields between bits of work."""
        part = self.slice(module)
        if part.layer in self._norms:
            return
        layer, squares = self.layer(part), torch.zeros(1, dtype=torch.float64)
        for more in _squares(layer):
            squares = squares + more.cpu()
            yield
        if ranks.sees_a_part(layer.base_layer):
            squares = ranks.added_up(squares)
        self._norms[part.layer] = squares.sqrt().float()

    def bias(self, module: str) -> torch.Tensor | None:
        """[out] b0, float32; None if the layer has none.

        Raises:
            DoesNotFit: as `product`.
        """
        part = self.slice(module)
        bias = self.layer(part).base_layer.bias
        return None if bias is None else self._own(part, bias.detach().float(), 0)

    def _own(self, part: Slice, found: torch.Tensor, other: float) -> torch.Tensor:
        """A module's [..., out], in the checkpoint's order; on the CPU.

        Args:
            part: the module.
            found: [..., out of this rank] of its layer.
            other: in the place of what lies on other ranks.
        """
        whole = self._known[part.layer].out
        everything = torch.full((*found.shape[:-1], whole), other, dtype=found.dtype)
        everything[..., ranks.own_outputs(self.layer(part).base_layer)] = found.cpu()
        own = everything[..., part.start : part.start + part.out]
        if part.order is None:
            return own
        sorted_ = torch.empty_like(own)
        sorted_[..., part.order] = own
        return sorted_


def _own_inputs(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """This rank's columns of x [n, in], for a wrapped layer whose input is split."""
    base = layer.base_layer
    size: int = base.input_size_per_partition
    return x[:, base.tp_rank * size : (base.tp_rank + 1) * size].contiguous()


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[n, out] x Wᵀ in the engine's dtype, of a wrapped layer: of this rank's rows and columns."""
    base = layer.base_layer
    made: torch.Tensor = base.quant_method.apply(base, x.to(layer.device, base.params_dtype))
    return made


def _squares(layer: Any) -> Iterator[torch.Tensor]:
    """Parts of [out] ‖W‖² of each row that this rank has, float64, which are to be added.

    Raises:
        DoesNotFit: W cannot be read by products with it.
    """
    base = layer.base_layer
    weight, into = getattr(base, "weight", None), base.input_size
    if ranks.sees_a_part(base):
        into = base.input_size_per_partition
    plain = isinstance(base.quant_method, UnquantizedLinearMethod)
    out = getattr(base, "output_size_per_partition", base.output_size)
    if plain and weight is not None and weight.shape == (out, into):
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
