"""MeteoRA packs (arXiv 2405.13053): LoRA adapters and the gates that route between them.

Two layouts, told apart by `meteora.json`, a small config of ours:

- released: the authors' own file, `model.safetensors`, which holds a copy of the base (skipped)
  and per layer `moe_gate.weight [n, in]`, `lora_A.weight [n·r, in]`, `lora_B.weight [out, n·r]`.
  It lacks r, alpha, k, T and the tasks, so the config has them:
  `{"layout": "released", "rank": 8, "alpha": 16, "top_k": 2, "temperature": 1, "tasks": [...]}`
- native: ordinary PEFT adapters in sub-folders and a file of gates, `gates.safetensors`, with
  `<module>.moe_gate.weight [n, in]` for every module that an adapter changes:
  `{"layout": "native", "top_k": 2, "temperature": 1, "tasks": ["gsm8k", ...]}`, where each task is
  the name of its sub-folder.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.artefact import (
    LARGEST_ALPHA,
    TEMPERATURES,
    Artefact,
    Gate,
    Part,
    Place,
    inside,
)
from adapters.formats.config import read_object
from adapters.formats.header import TensorInfo, read_header
from adapters.formats.peft import read_peft

CONFIG = "meteora.json"
RELEASED = "model.safetensors"
GATES = "gates.safetensors"

_KEYS = {
    "released": {"layout", "rank", "alpha", "top_k", "temperature", "tasks"},
    "native": {"layout", "top_k", "temperature", "tasks"},
}
_MAX_RANK = 1 << 20
_PREFIX = "base_model.model."
_OURS = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|moe_gate)\.weight")
_GATE = re.compile(r"(.+)\.moe_gate\.weight")


def read_meteora(folder: Path) -> Artefact:
    """The pack in a folder; headers only.

    Raises:
        BadAdapter: files are missing or broken, the config and the tensors disagree, or a tensor
            does not belong.
    """
    config = read_object(inside(folder, CONFIG))
    layout = str(config.get("layout"))
    if layout not in _KEYS:
        raise _bad("layout", layout, "released, native")
    if unknown := config.keys() - _KEYS[layout]:
        raise _bad(sorted(unknown)[0], None, ", ".join(sorted(_KEYS[layout])))
    tasks = _tasks(config.get("tasks"))
    pack = _released(folder, config, tasks) if layout == "released" else _native(folder, tasks)
    top_k = config.get("top_k", min(2, len(tasks)))
    if type(top_k) is not int or not 1 <= top_k <= len(tasks):
        raise _bad("top_k", top_k, f"1 to {len(tasks)}")
    temperature = _between(config, "temperature", TEMPERATURES, 1.0)
    return replace(pack, top_k=top_k, temperature=temperature)


def base_copy(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a released file that are the base's own, by their name in the base."""
    return {
        name.removeprefix(_PREFIX).replace(".base_layer.", "."): info
        for name, info in read_header(inside(folder, RELEASED)).items()
        if not _OURS.fullmatch(name)
    }


def _bad(key: str, value: object, allowed: str) -> BadAdapter:
    return BadAdapter(
        "unknown or bad value", field=f"{CONFIG}: {key}", value=value, allowed=allowed
    )


def _tasks(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else []
    if not names or any(not re.fullmatch(r"[\w][\w.-]{0,99}", str(n)) for n in names):
        raise _bad("tasks", value, "a list of names made of letters, digits, _ . -")
    if len(set(names)) != len(names):
        raise _bad("tasks", value, "names that differ")
    return tuple(map(str, names))


def _between(
    config: dict[str, Any], key: str, bounds: tuple[float, float], default: float | None = None
) -> float:
    value: Any = config.get(key, default)
    low, high = bounds
    if type(value) not in (int, float) or not low <= value <= high:
        raise _bad(key, value, f"{low:g} to {high:g}")
    return float(value)


def _released(folder: Path, config: dict[str, Any], tasks: tuple[str, ...]) -> Artefact:
    rank = config.get("rank")
    if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
        raise _bad("rank", rank, f"1 to {_MAX_RANK}")
    scale = _between(config, "alpha", (sys.float_info.min, LARGEST_ALPHA)) / rank
    header = read_header(inside(folder, RELEASED))
    modules: dict[str, set[str]] = {}
    for name in header:
        if match := _OURS.fullmatch(name):
            modules.setdefault(match[1], set()).add(match[2])
        elif "lora_" in name or "moe_gate" in name or not name.startswith(_PREFIX):
            raise BadAdapter("unexpected tensor", field=f"{RELEASED}: {name}")
    if not modules:
        raise BadAdapter("has no MeteoRA tensors", field=RELEASED)
    gates, total = {}, rank * len(tasks)
    for module, names in modules.items():
        if missing := {"lora_A", "lora_B", "moe_gate"} - names:
            raise BadAdapter(f"{sorted(missing)[0]} is missing", field=f"{RELEASED}: {module}")
        gates[module] = Gate(RELEASED, f"{_PREFIX}{module}.moe_gate.weight")
        _check(header, f"{_PREFIX}{module}.lora_A.weight", 0, total)
        _check(header, f"{_PREFIX}{module}.lora_B.weight", 1, total)
        _check(header, gates[module].name, 0, len(tasks))

    def part(module: str, j: int) -> Part:
        a, b = (Place(RELEASED, f"{_PREFIX}{module}.lora_{half}.weight") for half in "AB")
        return Part(a, b, j * rank, (j + 1) * rank, scale)

    parts = tuple({m: part(m, j) for m in modules} for j in range(len(tasks)))
    return Artefact(folder, "meteora", tasks, parts, gates, tuple(sorted((CONFIG, RELEASED))))


def _check(header: dict[str, TensorInfo], name: str, axis: int, size: int) -> None:
    shape = header[name].shape
    if len(shape) != 2 or shape[axis] != size:
        raise BadAdapter(
            "its shape does not match the config's tasks and rank",
            field=f"{RELEASED if name.startswith(_PREFIX) else GATES}: {name}",
            value=shape,
            allowed=f"{size} in dimension {axis}",
        )


def _native(folder: Path, tasks: tuple[str, ...]) -> Artefact:
    parts, files = [], [CONFIG, GATES]
    for task in tasks:
        adapter = read_peft(folder / task, task)
        if adapter.invocation:
            raise BadAdapter("an aLoRA cannot be a pack's member",
                             field=f"{task}: alora_invocation_tokens")  # fmt: skip
        files += [f"{task}/{name}" for name in adapter.files]
        modules = adapter.parts[0]
        if moved := [m for m, part in modules.items() if part.inputs]:
            raise BadAdapter(
                "a pack takes no IA3 on the inputs of a layer: it acts in the layer before, which "
                "this gate is not for",
                field=f"{task}: {moved[0]}",
            )
        parts.append({m: part.inside(task) for m, part in modules.items()})
        for name in adapter.files:
            inside(folder, f"{task}/{name}")
    header, gates = read_header(inside(folder, GATES)), {}
    for name in header:
        match = _GATE.fullmatch(name)
        if match is None or not any(match[1] in modules for modules in parts):
            raise BadAdapter("belongs to no module of an adapter", field=f"{GATES}: {name}")
        _check(header, name, 0, len(tasks))
        gates[match[1]] = Gate(GATES, name)
    for task, modules in zip(tasks, parts, strict=True):
        if ungated := modules.keys() - gates.keys():
            raise BadAdapter(
                f"the pack has no gate for this module of {task}",
                field=f"{GATES}: {sorted(ungated)[0]}",
            )
    return Artefact(folder, "meteora", tasks, tuple(parts), gates, tuple(sorted(files)))
