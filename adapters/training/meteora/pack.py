"""Writes a trained pack in the native format (`adapters.formats.meteora`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.formats import meteora, peft
from adapters.formats.artefact import Artefact
from adapters.training.meteora.routed import Routed
from adapters.training.meteora.settings import Settings


def write_pack(
    folder: Path, settings: Settings, artefacts: Sequence[Artefact], layers: dict[str, Routed]
) -> None:
    """Writes the adapters, the gates (float32) and `meteora.json`.

    Adapters that were not trained are copied byte by byte; trained ones keep names and dtype.

    Args:
        folder: of the pack; what is there is removed.
        settings: the run's.
        artefacts: the adapters as they came.
        layers: module name → trained layer.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for member, (task, artefact) in enumerate(zip(settings.adapters, artefacts, strict=True)):
        (folder / task).mkdir(parents=True)
        shutil.copyfile(artefact.folder / peft.CONFIG, folder / task / peft.CONFIG)
        _copy_weights(artefact, folder / task / peft.WEIGHTS)
        if settings.adapters_rate is not None:
            _write_trained(folder / task / peft.WEIGHTS, artefact, layers, member)
    gates = {f"{n}.moe_gate.weight": layer.gate.detach().cpu() for n, layer in layers.items()}
    save_file({name: gate.contiguous() for name, gate in gates.items()}, folder / meteora.GATES)
    config = {
        "layout": "native",
        "top_k": settings.top_k,
        "temperature": settings.temperature,
        "tasks": list(settings.adapters),
    }
    (folder / meteora.CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _copy_weights(artefact: Artefact, path: Path) -> None:
    """Copies the weights; shards become one file."""
    if peft.WEIGHTS in artefact.files:
        shutil.copyfile(artefact.folder / peft.WEIGHTS, path)
        return
    tensors: dict[str, Tensor] = {}
    for name in artefact.files:
        if name.endswith(".safetensors"):
            tensors |= load_file(artefact.folder / name)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_trained(path: Path, artefact: Artefact, layers: dict[str, Routed], member: int) -> None:
    tensors = load_file(path)
    for module, part in artefact.parts[0].items():
        layer = layers[module]
        own = layer.owner == member
        assert part.a is not None and part.b is not None
        for place, value in ((part.a, layer.a[own]), (part.b, layer.b[:, own])):
            tensors[place.name] = value.detach().to("cpu", tensors[place.name].dtype).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
