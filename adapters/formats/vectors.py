"""Steering vectors in our own format: `vector_config.json` and `vectors.safetensors`; or bare.

    {"kind": "vector", "scale": 1.0, "where": "reply"}

The tensors of kind `vector` are constants, by the layer that they are added behind: `12` or
`model.layers.12` [H] at the output of decoder layer 12; `<module>.shift` [in] and `<module>.heads`
[in] at the input of a linear layer (`Part.shift`, `Part.heads`). Those of kind `loreft` are
`12.rotate` [H, r], `12.weight` [r, H] and `12.bias` [r] (arXiv 2404.03592). Those of kind
`conditional` are constants behind decoder layers, and `6.condition` [H]
(`adapters.formats.conditions`).

Bare are `vectors.safetensors` with constants behind decoder layers and no config, and llama.cpp's
control vectors, `vectors.gguf` (`adapters.formats.control_vector`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.artefact import LARGEST_ALPHA, Artefact, Kind, Part, Place, inside
from adapters.formats.blocks import block_number, block_of
from adapters.formats.conditions import KEYS, SUFFIX, Condition, read_condition
from adapters.formats.config import read_object
from adapters.formats.header import TensorInfo, read_header
from adapters.where import REPLY, Where, read_where

CONFIG = "vector_config.json"
TENSORS = "vectors.safetensors"
GGUF = "vectors.gguf"

_KEYS = ("kind", "scale", "where", "head_size", "base_model_name_or_path")
_KINDS: tuple[Kind, ...] = ("vector", "loreft", "conditional")
_REFT = {"rotate": "rotate", "weight": "source", "bias": "source_bias"}


def present(folder: Path) -> bool:
    """Whether a folder has vectors."""
    return any((folder / file).is_file() for file in (CONFIG, TENSORS, GGUF))


def read_vectors(folder: Path, name: str = "vector") -> Artefact:
    """The artefact in a folder; headers only.

    Args:
        folder: its own.
        name: what its one member is called.

    Raises:
        BadAdapter: files are missing or broken, or a tensor does not belong.
    """
    if not (folder / CONFIG).is_file():
        return _bare(folder, name)
    config = read_object(inside(folder, CONFIG))
    kind = config.get("kind")
    known = (*_KEYS, *KEYS) if kind == "conditional" else _KEYS
    if unknown := sorted(config.keys() - set(known)):
        raise _bad(unknown[0], config[unknown[0]], ", ".join(known))
    if kind not in _KINDS:
        raise _bad("kind", kind, ", ".join(_KINDS))
    scale = config.get("scale", 1.0)
    if type(scale) not in (int, float) or not abs(scale) <= LARGEST_ALPHA:
        raise _bad("scale", scale, "finite numbers")
    size = config.get("head_size", 0)
    if type(size) is not int or size < 0:
        raise _bad("head_size", size, "numbers of one attention head's output")
    tensors = read_header(inside(folder, TENSORS))
    condition = None
    if kind == "conditional":
        condition = read_condition(config, set(tensors), CONFIG, TENSORS)
        tensors = {n: info for n, info in tensors.items() if not n.endswith(SUFFIX)}
    made = _reft(tensors) if kind == "loreft" else _constants(tensors, TENSORS)
    parts = {m: replace(p, scale=float(scale), head_size=size) for m, p in made.items()}
    if not parts:
        raise BadAdapter("has no vectors", field=TENSORS)
    said = [config["where"]] if "where" in config else []
    where = tuple(read_where(one, f"{CONFIG}: where") for one in said)
    if condition is not None:
        where = where or ((REPLY,) if condition.gate == "prompt" else ())
        _check_conditional(condition, parts, where)
    found = Artefact(folder, kind, (name,), (parts,), {}, (CONFIG, TENSORS), where=where,
                     condition=condition)  # fmt: skip
    if found.by_values and not all(one.everywhere for one in where):
        raise _bad("where", config["where"], "all, where attention heads are scaled")
    return found


def _check_conditional(
    condition: Condition, parts: dict[str, Part], where: tuple[Where, ...]
) -> None:
    """Raises if a vector acts before all conditions are known."""
    for one in where:
        condition.check(one, f"{CONFIG}: where")
    for module in parts:
        if (number := block_number(module)) is None:
            raise BadAdapter("only constants behind decoder layers can have a condition",
                             field=f"{TENSORS}: {module}")  # fmt: skip
        if number < condition.last:
            raise BadAdapter(
                "acts before its condition is known",
                field=f"{TENSORS}: {number}",
                allowed=f"layers from the last condition's on: {condition.last}",
            )


def _bare(folder: Path, name: str) -> Artefact:
    """Constants behind decoder layers, in a file without a config."""
    file = GGUF if (folder / GGUF).is_file() else TENSORS
    if (folder / GGUF).is_file() and (folder / TENSORS).is_file():
        raise BadAdapter("two files of vectors", field=GGUF, allowed=f"one of {GGUF}, {TENSORS}")
    tensors = read_header(inside(folder, file))
    for tensor in tensors:
        if block_of(tensor) is None:
            raise BadAdapter(f"unexpected tensor in a file without {CONFIG}",
                             field=f"{file}: {tensor}",
                             allowed="<number>, <path of a decoder layer>")  # fmt: skip
    if not tensors:
        raise BadAdapter("has no vectors", field=file)
    return Artefact(folder, "vector", (name,), (_constants(tensors, file),), {}, (file,))


def _constants(tensors: dict[str, TensorInfo], file: str) -> dict[str, Part]:
    parts: dict[str, Part] = defaultdict(Part)
    for name in sorted(tensors):
        module, _, last = name.rpartition(".")
        if (block := block_of(name)) is not None:
            if parts[block].offset is not None:
                raise BadAdapter("a second vector for this layer", field=f"{file}: {name}")
            parts[block] = replace(parts[block], offset=Place(file, name))
        elif module and last in ("shift", "heads"):
            place: dict[str, Any] = {last: Place(file, name)}
            parts[module] = replace(parts[module], **place)
        else:
            raise _stranger(name, "<number>, <path of a decoder layer>, <module>.shift, "
                                  "<module>.heads")  # fmt: skip
    return dict(parts)


def _reft(tensors: dict[str, TensorInfo]) -> dict[str, Part]:
    parts: dict[str, Part] = defaultdict(Part)
    for name in sorted(tensors):
        path, _, last = name.rpartition(".")
        block = block_of(path)
        if block is None or last not in _REFT:
            raise _stranger(name, "<layer>.rotate, <layer>.weight, <layer>.bias")
        if getattr(parts[block], _REFT[last]) is not None:
            raise BadAdapter("given twice for this layer", field=f"{TENSORS}: {name}")
        place: dict[str, Any] = {_REFT[last]: Place(TENSORS, name)}
        parts[block] = replace(parts[block], **place)
    for block, part in parts.items():
        if part.rotate is None or part.source is None or part.source_bias is None:
            raise BadAdapter("lacks one of rotate, weight and bias", field=f"{TENSORS}: {block}")
        shape = tensors[part.rotate.name].shape
        if len(shape) != 2:
            raise BadAdapter("not a matrix", field=f"{TENSORS}: {part.rotate.name}", value=shape,
                             allowed="[hidden, rank]")  # fmt: skip
        parts[block] = replace(part, stop=shape[1])
    return dict(parts)


def _bad(key: str, value: Any, allowed: str) -> BadAdapter:
    return BadAdapter("cannot be served", field=f"{CONFIG}: {key}", value=value, allowed=allowed)


def _stranger(name: str, allowed: str) -> BadAdapter:
    return BadAdapter("unexpected tensor", field=f"{TENSORS}: {name}", allowed=allowed)
