"""What loading an adapter asks of the base's own layers: products, row norms and biases.

The layers of vLLM are asked through their own quantisation method, so packed, fused and quantised
weights are read as they run. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from adapters.errors import DoesNotFit

CHUNK = 128
"""Rows of an identity matrix, or of W, that one piece of work takes."""


class Slice(NamedTuple):
    """Where a module of the checkpoint lies in the engine.

    Args:
        layer: vLLM's LoRA layer, which wraps the linear layer.
        start: its first output in the layer's.
        stop: its last + 1; None: the layer's.
    """

    layer: Any
    start: int
    stop: int | None

    @property
    def outputs(self) -> slice:
        """The module's outputs in the layer's."""
        return slice(self.start, self.stop)


class EngineLayers:
    """The linear layers of the engine that adapters may change.

    Args:
        manager: vLLM's LoRA model manager, its layers wrapped.
    """

    def __init__(self, manager: Any) -> None:
        self._modules = manager.modules
        self._slices = {
            child: (parent, i)
            for parent, children in manager.packed_modules.items()
            for i, child in enumerate(children)
        }
        self._norms: dict[str, torch.Tensor] = {}

    def find(self, name: str) -> tuple[str, Slice] | None:
        """The engine's layer in which a module lies, and where; None if there is none.

        Args:
            name: as in the engine, `q_proj` also where it is a part of `qkv_proj`.
        """
        if (layer := self._modules.get(name)) is not None:
            return name, Slice(layer, 0, None)
        parent, i = self._slices.get(name, ("", 0))
        if (layer := self._modules.get(parent)) is None:
            return None
        sizes = layer.output_slices
        start = sum(sizes[:i])
        return parent, Slice(layer, start, start + sizes[i])

    def measure(self, name: str) -> Iterator[None]:
        """Finds the row norms of a layer, bit by bit, once; yields between two bits.

        Args:
            name: of the engine's layer.
        """
        if name in self._norms:
            return
        total: torch.Tensor | None = None
        for squares in _squares(self._modules[name]):
            total = squares if total is None else total + squares
            yield
        assert total is not None
        self._norms[name] = total.sqrt().float()

    def norms(self, name: str) -> torch.Tensor:
        """[out] row norms of the engine's layer; float32."""
        for _ in self.measure(name):
            pass
        return self._norms[name]


class OwnersLayers:
    """One model's layers by the names of its checkpoint; `adapters.parts.BaseLayers`.

    Args:
        engine: its layers.
        name: the engine's name of a checkpoint's module.
    """

    def __init__(self, engine: EngineLayers, name: Callable[[str], str]) -> None:
        self._engine, self._name = engine, name

    def product(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """[n, out] x Wᵀ without bias, float32; rounded as the engine rounds it.

        Args:
            module: as in the checkpoint.
            x: [n, in].

        Raises:
            DoesNotFit: the engine has no such layer, or only a part of it.
        """
        layer, outputs = self._find(module)
        return _apply(layer, x)[:, outputs].float()

    def row_norms(self, module: str) -> torch.Tensor:
        """[out] ‖W‖₂ of each row, not squared, float32; kept once it was found.

        Raises:
            DoesNotFit: as `product`; or a product with the layer is not linear.
        """
        _, outputs = self._find(module)
        return self._engine.norms(self._parent(module))[outputs]

    def measure(self, module: str) -> Iterator[None]:
        """Prepares `row_norms` bit by bit; yields between two bits."""
        self._find(module)
        yield from self._engine.measure(self._parent(module))

    def bias(self, module: str) -> torch.Tensor | None:
        """[out] b0, float32; None if the layer has none.

        Raises:
            DoesNotFit: as `product`.
        """
        layer, outputs = self._find(module)
        bias = layer.base_layer.bias
        return None if bias is None else bias.detach()[outputs].float()

    def _parent(self, module: str) -> str:
        found = self._engine.find(self._name(module))
        assert found is not None
        return found[0]

    def _find(self, module: str) -> tuple[Any, slice]:
        if get_tensor_model_parallel_world_size() > 1:
            why = "adapters that need the base's weights are not served under tensor parallelism"
            raise DoesNotFit(f"{why} (DoRA, and biases that replace the base's)", field=module)
        found = self._engine.find(self._name(module))
        if found is None:
            raise DoesNotFit("the engine cannot adapt this layer", field=module)
        return found[1].layer, found[1].outputs


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[n, out] x Wᵀ in the engine's dtype."""
    base = layer.base_layer
    made: torch.Tensor = base.quant_method.apply(base, x.to(layer.device, base.params_dtype))
    return made


def _squares(layer: Any) -> Iterator[torch.Tensor]:
    """Parts of [out] ‖W‖² of each row, float64, which are to be added.

    Raises:
        DoesNotFit: a product with the layer is not linear.
    """
    base = layer.base_layer
    weight, shape = getattr(base, "weight", None), (base.output_size, base.input_size)
    plain = isinstance(base.quant_method, UnquantizedLinearMethod)
    if plain and weight is not None and weight.shape == shape:
        for columns in weight.detach().split(CHUNK, 1):
            yield columns.double().square().sum(1)
        return
    for start in range(0, shape[1], CHUNK):
        one = torch.zeros(min(CHUNK, shape[1] - start), shape[1])
        one[:, start : start + CHUNK].fill_diagonal_(1)
        columns = _apply(layer, one).double()
        if not start:
            _check_linear(layer, one, columns)
        yield columns.square().sum(0)


def _check_linear(layer: Any, one: torch.Tensor, columns: torch.Tensor) -> None:
    """A fixed scale of the activations shows: it does not hold 1 and 0.7 alike."""
    other = _apply(layer, 0.7 * one).double() / 0.7
    if not (other - columns).abs().max() <= 0.01 * columns.abs().max():
        raise DoesNotFit(
            "the base's layer quantises its input with a fixed scale, so its weights cannot be read"
            " through it",
            field=str(getattr(layer.base_layer, "prefix", type(layer).__name__)),
        )
