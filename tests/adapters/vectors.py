"""Steering vectors on disk, and what they do by the plain formula: nothing of our loading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[torch.Tensor], torch.Tensor]
"""[..., H] states → what is added to them."""


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An artefact of our own format; a vector unless the config says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()},
              folder / "vectors.safetensors")  # fmt: skip
    (folder / "vector_config.json").write_text(json.dumps({"kind": "vector", **config}))
    return folder


def make_vector(
    folder: Path, hidden: int, layers: Sequence[int], *, seed: int, size: float = 0.5, **config: Any
) -> Path:
    """A constant behind some layers; its numbers are about `size`."""
    random = torch.Generator().manual_seed(seed)
    tensors = {f"model.layers.{n}": size * torch.randn(hidden, generator=random) for n in layers}
    return write(folder, tensors, **config)


def make_reft(
    folder: Path, hidden: int, layers: Sequence[int], *, seed: int, rank: int = 3, **config: Any
) -> Path:
    """LoReFT behind some layers."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for n in layers:
        rotate, _ = torch.linalg.qr(torch.randn(hidden, rank, generator=random))
        tensors[f"{n}.rotate"] = rotate
        tensors[f"{n}.weight"] = hidden**-0.5 * torch.randn(rank, hidden, generator=random)
        tensors[f"{n}.bias"] = torch.randn(rank, generator=random)
    return write(folder, tensors, **({"kind": "loreft"} | config))


def changes_of_states(folder: Path) -> dict[int, Change]:
    """Decoder layer → what an artefact of weight 1 adds to its output, in float64.

    h' = h + v, or h' = h + Rᵀ (W h + b − R h) with R = rotateᵀ (arXiv 2404.03592, eq. 2).
    """
    config = json.loads((folder / "vector_config.json").read_text())
    scale, tensors = config.get("scale", 1.0), load_file(folder / "vectors.safetensors")
    found: dict[int, Change] = {}
    if config["kind"] == "vector":
        for name, value in tensors.items():
            last = name.rsplit(".", 1)[-1]
            if last.isdecimal():
                found[int(last)] = _constant(scale * value.double())
        return found
    for n in {int(name.split(".")[-2]) for name in tensors}:
        own = {k.rsplit(".", 1)[-1]: v.double() for k, v in tensors.items() if f"{n}." in k}
        found[n] = _reft(own["rotate"].T, own["weight"], own["bias"], scale)
    return found


def _constant(vector: torch.Tensor) -> Change:
    return lambda h: vector.to(h.dtype).expand_as(h)


def _reft(r: torch.Tensor, w: torch.Tensor, b: torch.Tensor, scale: float) -> Change:
    def change(h: torch.Tensor) -> torch.Tensor:
        wide = h.double()
        return (scale * (wide @ w.T + b - wide @ r.T) @ r).to(h.dtype)

    return change


def acts(where: Any, position: int, length: int) -> bool:
    """Whether an adapter acts at a position of a text whose prompt has `length` tokens: written
    word by word, beside `adapters.where`.
    """
    reply = position - length
    if where is None or where == "all":
        return True
    if isinstance(where, str):
        return {
            "prompt": position < length,
            "reply": position >= length,
            "last_prompt": position == length - 1,
        }[where]
    if reply >= 0:
        if "from" not in where and "first" not in where:
            return False
        return where.get("from", 0) <= reply < where.get("first", reply + 1)
    first, last = where.get("prompt_first", 0), where.get("prompt_last", 0)
    if where.get("halved"):
        first, last = min(first, length // 2), min(last, length // 2)
    return position < first or position >= length - last


def changes_of_heads(folder: Path) -> list[tuple[str, str, torch.Tensor]]:
    """(linear layer, `heads` or `shift`, [in]) of what an artefact does to inputs of layers."""
    config = json.loads((folder / "vector_config.json").read_text())
    tensors = load_file(folder / "vectors.safetensors")
    parts = [(*name.rpartition(".")[::2], value) for name, value in tensors.items()]
    scale = config.get("scale", 1.0)
    return [(m, part, scale * v) for m, part, v in parts if m and part in ("heads", "shift")]
