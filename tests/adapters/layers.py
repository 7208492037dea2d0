"""The adapter sum over `transformers` models, and a checkpoint's layers read plainly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters.formats.base import base_shapes
from adapters.formats.inputs import moved
from adapters.formats.inspect import read_artefact
from adapters.parts import LoadedPart, load_part
from adapters.tensors import TensorFile


class CheckpointLayers:
    """`BaseLayers` over a folder with one safetensors file."""

    def __init__(self, folder: Path) -> None:
        self._shapes, self._tensors = base_shapes(folder), load_file(folder / "model.safetensors")

    def linear(self, module: str) -> tuple[int, int] | None:
        """(out, in)."""
        return self._shapes.linear(module)

    def product(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """Without the bias."""
        return x @ self._weight(module).T

    def row_norms(self, module: str) -> torch.Tensor:
        """‖W‖₂ of each row."""
        return self._weight(module).norm(dim=1)

    def bias(self, module: str) -> torch.Tensor | None:
        """b0."""
        return self._tensors.get(f"{module}.bias")

    def _weight(self, module: str) -> torch.Tensor:
        weight = self._tensors[f"{module}.weight"]
        return weight.T if module.rsplit(".", 1)[-1] in self._shapes.conv1d else weight


def loaded(folder: Path, base: Path) -> dict[str, LoadedPart]:
    """Layer → what an adapter's one member does to it."""
    layers = CheckpointLayers(base)
    artefact = moved(read_artefact(folder), layers)
    return {
        module: load_part(
            part, module, lambda p: TensorFile(artefact.folder / p.file)[p.name], layers
        )
        for module, part in artefact.parts[0].items()
    }


def with_parts(base: Path, parts: dict[str, LoadedPart], weight: float = 1.0) -> Any:
    """The base in float64 with the adapter sum on its layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    for module, part in parts.items():
        model.get_submodule(module).register_forward_hook(_hook(part, weight))
    return model


def _hook(
    part: LoadedPart, weight: float
) -> Callable[[Any, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
    def hook(_: Any, inputs: tuple[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        added = torch.zeros_like(t)
        if part.diagonal is not None:
            added += part.diagonal.double() * t
        if part.a is not None and part.b is not None:
            added += (inputs[0] @ part.a.double().T) @ part.b.double().T
        if part.constant is not None:
            added += part.constant.double()
        return t + weight * added

    return hook
