"""Steering vectors on disk, and what they do by the plain formula: nothing of our loading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters.kernels.reference import similarity
from tests.models import make_tokenizer

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
    if config["kind"] in ("vector", "conditional"):
        for name, value in tensors.items():
            last = name.rsplit(".", 1)[-1]
            if last.isdecimal():
                found[int(last)] = _constant(scale * value.double())
        return found
    for n in {int(name.split(".")[-2]) for name in tensors}:
        own = {k.rsplit(".", 1)[-1]: v.double() for k, v in tensors.items() if f"{n}." in k}
        found[n] = _reft(own["rotate"].T, own["weight"], own["bias"], scale)
    return found


def make_conditional(
    folder: Path,
    hidden: int,
    layers: Sequence[int],
    conditions: dict[int, dict[str, float]],
    *,
    seed: int,
    size: float = 0.5,
    **config: Any,
) -> Path:
    """Constants behind some layers, under a condition; its vectors depend on their layer alone."""
    random = torch.Generator().manual_seed(seed)
    tensors = {str(n): size * torch.randn(hidden, generator=random) for n in layers}
    tensors |= {f"{n}.condition": condition_vector(hidden, n) for n in conditions}
    given = {str(n): one for n, one in conditions.items()}
    return write(folder, tensors, kind="conditional", conditions=given, **config)


def condition_vector(hidden: int, layer: int) -> torch.Tensor:
    """[H] of a layer."""
    return torch.randn(hidden, generator=torch.Generator().manual_seed(100 + layer))


def conditions_of(folder: Path) -> dict[int, Callable[[torch.Tensor], bool]]:
    """Decoder layer → whether a state [H] of its output meets the condition there, in float64."""
    config = json.loads((folder / "vector_config.json").read_text())
    tensors = load_file(folder / "vectors.safetensors")
    projected = config.get("similarity", "projected") == "projected"

    def met(number: str, one: dict[str, float]) -> Callable[[torch.Tensor], bool]:
        c = tensors[f"{number}.condition"].double().numpy()
        ((side, threshold),) = one.items()

        def decides(state: torch.Tensor) -> bool:
            found = similarity(state.double().numpy(), c, projected=projected)
            return found > threshold if side == "above" else found < threshold

        return decides

    return {int(number): met(number, one) for number, one in config["conditions"].items()}


def _constant(vector: torch.Tensor) -> Change:
    return lambda h: vector.to(h.dtype).expand_as(h)


def _reft(r: torch.Tensor, w: torch.Tensor, b: torch.Tensor, scale: float) -> Change:
    def change(h: torch.Tensor) -> torch.Tensor:
        wide = h.double()
        return (scale * (wide @ w.T + b - wide @ r.T) @ r).to(h.dtype)

    return change


def acts(where: Any, position: int, length: int, ids: Sequence[int] = ()) -> bool:
    """Whether an adapter acts at a position of a text whose prompt has `length` tokens: written
    word by word, beside `adapters.where`.

    Args:
        where: JSON.
        position: of the token.
        length: of the prompt.
        ids: of the text, up to the position at least.
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
    if isinstance(where, dict) and ("after" in where or "until" in where):
        if reply < 0:
            return False
        for key in ("after", "until"):
            if key in where and _there(where[key], ids[:length], ids[length:position]) == (
                key == "until"
            ):
                return False
        return where.get("from", 0) <= reply < where.get("first", reply + 1)
    if reply >= 0:
        if "from" not in where and "first" not in where:
            return False
        return where.get("from", 0) <= reply < where.get("first", reply + 1)
    first, last = where.get("prompt_first", 0), where.get("prompt_last", 0)
    if where.get("halved"):
        first, last = min(first, length // 2), min(last, length // 2)
    return position < first or position >= length - last


def _there(text: str, prompt: Sequence[int], reply: Sequence[int]) -> bool:
    """Whether a text stands in a reply, or closes in the prompt what was opened there."""
    encode = partial(make_tokenizer().encode, add_special_tokens=False)
    ids, opener = encode(text), encode(text.replace("/", "")) if text.startswith("</") else []

    def places(part: list[int], among: Sequence[int]) -> list[int]:
        last = len(among) - len(part)
        return [i for i in range(last + 1) if part and list(among[i : i + len(part)]) == part]

    opened, closed = places(opener, prompt), places(ids, prompt)
    return bool(places(ids, reply) or (opened and closed and closed[-1] > opened[-1]))


def changes_of_heads(folder: Path) -> list[tuple[str, str, torch.Tensor]]:
    """(linear layer, `heads` or `shift`, [in]) of what an artefact does to inputs of layers."""
    config = json.loads((folder / "vector_config.json").read_text())
    tensors = load_file(folder / "vectors.safetensors")
    parts = [(*name.rpartition(".")[::2], value) for name, value in tensors.items()]
    scale = config.get("scale", 1.0)
    return [(m, part, scale * v) for m, part, v in parts if m and part in ("heads", "shift")]
