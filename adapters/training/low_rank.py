"""LoRA (arXiv 2106.09685) of a whole body, trained here and written as PEFT does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.formats import peft
from adapters.formats.base import BaseShapes
from adapters.training.errors import BadRecipe


class LowRank(nn.Module):
    """A frozen linear layer and a trained product: y = base(x) + α/r · B A x. Trained in float32.

    Args:
        base: any module [.., in] → [.., out].
        a: A at the start, [r, in].
        out: rows of B, [out, r], which starts at 0.
        scale: α/r.
    """

    def __init__(self, base: nn.Module, a: Tensor, out: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(out, len(a)))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """[.., out] in the base's dtype."""
        y: Tensor = self.base(x)
        return y + (self.scale * (x.float() @ self.a.T) @ self.b.T).to(y.dtype)


def install(
    model: nn.Module, shapes: BaseShapes, rank: int, alpha: float, seed: int
) -> dict[str, LowRank]:
    """Puts a LoRA on every linear layer of a body; the model is frozen and changed in place.

    Args:
        model: with the names of its checkpoint.
        shapes: of the checkpoint.
        rank: r, ≥ 1.
        alpha: α.
        seed: of A, N(0, 1/in).

    Returns:
        Module name → the layer that stands there now, sorted by name.

    Raises:
        BadRecipe: no layer has the same name in the checkpoint and in the model.
    """
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name in sorted(name for name, _ in model.named_modules()):
        shape = shapes.linear(name)
        if shape is not None:
            a = shape[1] ** -0.5 * torch.randn(rank, shape[1], generator=random)
            found[name] = LowRank(model.get_submodule(name), a, shape[0], alpha / rank)
    if not found:
        raise BadRecipe(
            "no linear layer has the same name in the checkpoint and in transformers",
            field="--body",
            allowed="another body, or no --rank",
        )
    for name, layer in found.items():
        model.set_submodule(name, layer)
    return found


def write(
    folder: Path,
    layers: Mapping[str, LowRank],
    *,
    body: Path,
    shapes: BaseShapes,
    alpha: float,
    dtype: torch.dtype,
) -> None:
    """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: that exists.
        layers: from `install`.
        body: what they are for.
        shapes: of its checkpoint.
        alpha: α.
        dtype: of the tensors on disk.
    """
    tensors = {}
    for name, layer in layers.items():
        for half, value in (("A", layer.a), ("B", layer.b)):
            tensor = value.detach().to("cpu", dtype).contiguous()
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = tensor
    save_file(tensors, folder / peft.WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(body),
        "r": len(next(iter(layers.values())).a),
        "lora_alpha": alpha,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": bool(shapes.conv1d),
        "inference_mode": True,
    }
    (folder / peft.CONFIG).write_text(json.dumps(config, indent=1) + "\n")
