"""Random adapters on disk for the benchmarks: only their sizes matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters.formats.base import BaseShapes
from adapters.formats.blocks import block
from load_tests.shapes import BASE

RANK, TASKS = 8, 28


def modules(base: Mapping[str, int] = BASE) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of the base's linear layers, all seven of every layer."""
    hidden, inner = base["hidden_size"], base["intermediate_size"]
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    parts = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    parts |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    parts["mlp.down_proj"] = (hidden, inner)
    return {
        f"model.layers.{i}.{name}": shape
        for i in range(base["num_hidden_layers"])
        for name, shape in parts.items()
    }


def shapes() -> BaseShapes:
    """The base's shapes; its file is not written, because vLLM draws dummy weights."""
    hidden = BASE["hidden_size"]
    states = {block(n): (hidden, hidden) for n in range(BASE["num_hidden_layers"])}
    return BaseShapes(
        {f"{name}.weight": shape for name, shape in modules().items()}, layers=modules() | states
    )


def write_lora(folder: Path, seed: int, base: Mapping[str, int] = BASE) -> None:
    """A PEFT adapter of rank 8 on all seven modules of a base of that shape, bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into) in modules(base).items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _draw(random, RANK, into, gain=into**-0.5)
        tensors[f"{prefix}.lora_B.weight"] = _draw(random, out, RANK, gain=0.01)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules(base)}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_vector(folder: Path, seed: int, base: Mapping[str, int] = BASE) -> Path:
    """A constant behind every decoder layer of a base of that shape, bfloat16; the folder."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{n}": _draw(random, base["hidden_size"], gain=0.05)
        for n in range(base["num_hidden_layers"])
    }
    save_file(tensors, folder / "vectors.safetensors")
    (folder / "vector_config.json").write_text(json.dumps({"kind": "vector"}))
    return folder


def write_pack(folder: Path, seed: int) -> None:
    """A MeteoRA pack as its authors release theirs: 28 adapters of rank 8 on all seven modules.

    Gates are drawn from N(0, 1), as before training, so tokens spread over all adapters.
    """
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into) in modules().items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _draw(random, TASKS * RANK, into, gain=into**-0.5)
        tensors[f"{prefix}.lora_B.weight"] = _draw(random, out, TASKS * RANK, gain=0.01)
        tensors[f"{prefix}.moe_gate.weight"] = _draw(random, TASKS, into, gain=1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "layout": "released",
        "rank": RANK,
        "alpha": 2 * RANK,
        "top_k": 2,
        "temperature": 1,
        "tasks": [f"task{j}" for j in range(TASKS)],
    }
    (folder / "meteora.json").write_text(json.dumps(config))


def _draw(random: torch.Generator, *shape: int, gain: float) -> torch.Tensor:
    return (gain * torch.randn(*shape, generator=random)).bfloat16()
