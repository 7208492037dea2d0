"""Random adapters on disk, for tests that need real ones; PEFT writes the LoRA adapters.

Gates are drawn so that their scores are about 1. With scores of 10, as N(0, 1) would give, float32
itself is 1e-4 away from float64 in `transformers`, and no engine could be told from a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.reference import fresh

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def make_lora(
    folder: Path, base: Path, *, seed: int, targets: Sequence[str] | str = ALL, **config: Any
) -> Path:
    """A PEFT adapter whose effect is plain to see, written by PEFT.

    Args:
        folder: made if it is missing.
        base: the model that it is for.
        seed: two seeds are two unrelated adapters.
        targets: names of the layers that it changes, or a regular expression for them.
        config: more of `LoraConfig`; rank 4 and alpha 8 unless given.
    """
    named = targets if isinstance(targets, str) else list(targets)
    wrapped = get_peft_model(
        fresh(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": named, **config})
    )
    random = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            fan_in = parameter.shape[1]
            gain = 0.5 if "lora_B" in name else 1.0
            parameter.data.normal_(0, gain * fan_in**-0.5, generator=random)
    wrapped.save_pretrained(folder)
    return folder


def make_native(folder: Path, base: Path, *, tasks: int, seed: int, **lora: Any) -> Path:
    """A native MeteoRA pack of `tasks` PEFT adapters, ranks 2, 3, 4, 2, ….

    The adapters of odd tasks leave the MLP alone, so that layers differ in who changes them.
    """
    names = [f"task{j}" for j in range(tasks)]
    modules: dict[str, int] = {}
    for j, name in enumerate(names):
        targets = ATTENTION if j % 2 else ALL
        make_lora(folder / name, base, seed=seed + j, targets=targets, r=2 + j % 3, **lora)
        for tensor, value in load_file(folder / name / "adapter_model.safetensors").items():
            if tensor.endswith("lora_A.weight"):
                modules[tensor.split(".", 2)[2].removesuffix(".lora_A.weight")] = value.shape[1]
    random = torch.Generator().manual_seed(seed)
    gates = {
        f"{module}.moe_gate.weight": width**-0.5 * torch.randn(tasks, width, generator=random)
        for module, width in modules.items()
    }
    save_file(gates, folder / "gates.safetensors")
    config = {"layout": "native", "top_k": 2, "temperature": 1, "tasks": names}
    (folder / "meteora.json").write_text(json.dumps(config))
    return folder


def make_released(folder: Path, base: Path, *, tasks: int, seed: int, rank: int = 2) -> Path:
    """A pack as the authors released theirs, with its copy of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in load_file(base / "model.safetensors").items():
        prefix, last = "base_model.model." + name.removesuffix(".weight"), name.split(".")[-2]
        if last not in ALL:
            tensors[f"base_model.model.{name}"] = value
            continue
        out, into = value.shape
        tensors[f"{prefix}.base_layer.weight"] = value
        for tensor, shape in {
            "lora_A": (tasks * rank, into),
            "lora_B": (out, tasks * rank),
            "moe_gate": (tasks, into),
        }.items():
            scale = 0.3 if tensor == "lora_B" else into**-0.5
            tensors[f"{prefix}.{tensor}.weight"] = scale * torch.randn(*shape, generator=random)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"layout": "released", "rank": rank, "alpha": 2 * rank, "top_k": 2, "temperature": 1}
    config["tasks"] = [f"task{j}" for j in range(tasks)]
    (folder / "meteora.json").write_text(json.dumps(config))
    return folder


def spoiled(folder: Path, into: Path) -> Path:
    """A copy of an adapter with one NaN."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    tensors = load_file(into / "adapter_model.safetensors")
    tensors[min(tensors)].view(-1)[0] = torch.nan
    save_file(tensors, into / "adapter_model.safetensors")
    return into
