"""A tiny quantised checkpoint, and the float model that it stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP, BITS = 32, 4

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": GROUP, "dynamic": False,
            },
        }
    },
}  # fmt: skip
"""Of config.json; the format: https://github.com/vllm-project/compressed-tensors."""


def quantise(model: Path, into: Path) -> tuple[Path, Path]:
    """Folders of a model with 4-bit layers, as they are stored, and with the same layers in float.

    Args:
        model: a checkpoint whose linear layers have input sizes that are multiples of `GROUP`.
        into: for the two folders.
    """
    packed, plain = into / "packed", into / "plain"
    for folder in (packed, plain):
        shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    stored, floats = {}, {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = floats[name] = weight
            continue
        groups = weight.view(weight.shape[0], -1, GROUP)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        numbers = (groups / scale).round().clamp(-8, 7)
        floats[name] = (numbers * scale).view_as(weight).contiguous()
        stem = name.removesuffix("weight")
        stored |= {
            f"{stem}weight_packed": _pack(numbers.view_as(weight).to(torch.int64) + 8),
            f"{stem}weight_scale": scale.squeeze(-1).bfloat16(),
            f"{stem}weight_shape": torch.tensor(weight.shape),
        }
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return packed, plain


def _pack(numbers: torch.Tensor) -> torch.Tensor:
    """[out, in / 8] int32 of [out, in] numbers from 0 to 15, the first in the lowest bits."""
    each = numbers.view(numbers.shape[0], -1, 32 // BITS)
    total = (each << (BITS * torch.arange(32 // BITS))).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)
