"""Tiny quantised checkpoints, packed by hand from those of `tests.models`.

Each writer replaces the linear layers of a model by tensors in the format of one scheme, as the
tools that make such checkpoints write them, and leaves the layers that the scheme excludes. The
formats are those that vLLM 0.32 reads (its `model_executor/layers/quantization`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import make_model

GROUP = 32
"""Input numbers that share a scale, in the schemes with groups."""

LEFT = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
"""Layers that every checkpoint excludes besides the unembedding, each named in the scheme's way."""

Tensors = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], Tensors]


def make_quantised(
    folder: Path, scheme: str, *, architecture: str = "llama", seed: int = 0
) -> Path:
    """Writes a quantised model with its tokenizer.

    Args:
        folder: made if it is missing.
        scheme: a key of `SCHEMES`.
        architecture: as in `tests.models.make_model`.
        seed: of the model.

    Returns:
        `folder`.
    """
    make_model(folder, architecture, seed=seed)
    write, config = SCHEMES[scheme]
    quantise(folder, write, config)
    return folder


def quantise(folder: Path, write: Writer, config: dict[str, Any]) -> None:
    """Quantises the linear layers of the model in `folder`, in place.

    Args:
        folder: a checkpoint with `model.safetensors`.
        write: [out, in] weight → the tensors that stand for it, by what they are called.
        config: its `quantization_config`.
    """
    file = folder / "model.safetensors"
    kept: Tensors = {}
    for name, tensor in load_file(file).items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj") or any(layer.endswith(left) for left in LEFT):
            kept[name] = tensor
        else:
            kept |= {f"{layer}.{part}": t.contiguous() for part, t in write(tensor).items()}
    save_file(kept, file, {"format": "pt"})
    whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")


# --- numbers ------------------------------------------------------------------------------------


def _grouped(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers [out, in] and scales [out, in / GROUP]."""
    most = 2 ** (bits - 1) - 1
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1) / most
    integers = (groups / scale[..., None]).round().clamp(-most - 1, most)
    return integers.reshape(weight.shape).to(torch.int32), scale


def _packed(integers: torch.Tensor, dim: int, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Eight 4-bit numbers of 0 to 15 in each int32, along `dim`; `order[i]` is in bits 4i."""
    moved = integers.to(torch.int64).movedim(dim, -1)
    eights = moved.reshape(*moved.shape[:-1], -1, 8)
    whole = sum(eights[..., source] << (4 * i) for i, source in enumerate(order))
    assert isinstance(whole, torch.Tensor)
    signed = torch.where(whole >= 2**31, whole - 2**32, whole)
    return signed.to(torch.int32).movedim(-1, dim)


# --- compressed-tensors -------------------------------------------------------------------------


def _int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _int8_static(weight: torch.Tensor) -> Tensors:
    return {**_int8(weight), "input_scale": torch.tensor([0.03])}


def _int8_asymmetric(weight: torch.Tensor) -> Tensors:
    zero = torch.tensor([5], dtype=torch.int8)
    return {**_int8_static(weight), "input_zero_point": zero}


def _w4a16(weight: torch.Tensor) -> Tensors:
    integers, scale = _grouped(weight, 4)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    packed = _packed(integers + 8, 1)
    return {"weight_packed": packed, "weight_scale": scale.half(), "weight_shape": shape}


def _compressed(
    kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", LEFT[0], r"re:.*layers\.1\.self_attn\.o_.*"],
    }


_PER_CHANNEL = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
}  # fmt: skip
_PER_TOKEN = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
}  # fmt: skip
_PER_TENSOR = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False,
}  # fmt: skip
_FOUR_BITS = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
    "dynamic": False,
}  # fmt: skip

# --- AWQ, GPTQ, FP8 -----------------------------------------------------------------------------

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(weight: torch.Tensor) -> Tensors:
    integers, scale = _grouped(weight, 4)
    zeros = torch.full((weight.shape[1] // GROUP, weight.shape[0]), 8)
    return {
        "qweight": _packed(integers.t() + 8, 1, _AWQ_ORDER),
        "qzeros": _packed(zeros, 1, _AWQ_ORDER),
        "scales": scale.t().half(),
    }


def _gptq(weight: torch.Tensor) -> Tensors:
    integers, scale = _grouped(weight, 4)
    # The format stores a zero point less one.
    zeros = torch.full((weight.shape[1] // GROUP, weight.shape[0]), 7)
    return {
        "qweight": _packed(integers.t() + 8, 0),
        "qzeros": _packed(zeros, 1),
        "scales": scale.t().half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def _fp8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
    "checkpoint_format": "gptq", "lm_head": False,
    "dynamic": {rf"-:{re.escape(name)}": {} for name in LEFT},
}  # fmt: skip
_AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["lm_head", *LEFT],
}  # fmt: skip

SCHEMES: dict[str, tuple[Writer, dict[str, Any]]] = {
    "int8": (_int8, _compressed("int-quantized", _PER_CHANNEL, _PER_TOKEN)),
    "int8-static": (_int8_static, _compressed("int-quantized", _PER_CHANNEL, _PER_TENSOR)),
    "int8-asymmetric": (
        _int8_asymmetric,
        _compressed("int-quantized", _PER_CHANNEL, {**_PER_TENSOR, "symmetric": False}),
    ),
    "w4a16": (_w4a16, _compressed("pack-quantized", _FOUR_BITS, None)),
    "awq": (_awq, _AWQ),
    "gptq": (_gptq, _GPTQ),
    "auto-round": (
        _gptq,
        {
            **{k: v for k, v in _GPTQ.items() if k != "dynamic"},
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq",
            "autoround_version": "0.5", "data_type": "int",
            "extra_config": {name: {"bits": 16, "data_type": "float"} for name in LEFT},
        },
    ),
    "fp8": (
        _fp8,
        {
            "quant_method": "fp8", "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", *LEFT],
        },
    ),
}  # fmt: skip
"""Name → its writer and `quantization_config`."""
