"""The tensors of a PEFT folder, in one file or in several with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.artefact import Place, inside
from adapters.formats.config import read_object
from adapters.formats.header import TensorInfo, read_header

WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"

_MOST_SHARDS = 1000

Tensors = dict[str, tuple[Place, TensorInfo]]
"""Name → where it lies and what it is."""


def find_tensors(folder: Path) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of an adapter and the files that define them; headers only.

    The one file wins over an index beside it, as in PEFT.

    Raises:
        BadAdapter: a file is missing or broken, or the index and the shards disagree.
    """
    if not (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        header = read_header(inside(folder, WEIGHTS))
        return {name: (Place(WEIGHTS, name), info) for name, info in header.items()}, (WEIGHTS,)
    places = _weight_map(folder)
    files = shards(folder)
    tensors: Tensors = {}
    for shard in files:
        for name, info in read_header(inside(folder, shard)).items():
            if places.get(name) != shard:
                raise BadAdapter("is not in the index as in this file", field=f"{shard}: {name}")
            tensors[name] = (Place(shard, name), info)
    if missing := places.keys() - tensors.keys():
        name = min(missing)
        raise BadAdapter("the index has a tensor that this file lacks",
                         field=f"{places[name]}: {name}")  # fmt: skip
    return tensors, (INDEX, *files)


def shards(folder: Path) -> tuple[str, ...]:
    """The files that the index of a folder names.

    Raises:
        BadAdapter: it is broken, or names a file elsewhere.
    """
    return tuple(sorted(set(_weight_map(folder).values())))


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map: Any = read_object(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadAdapter("has no weight_map", field=INDEX)
    files = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard:
            raise BadAdapter("not a safetensors file beside the index", field=f"{INDEX}: {name}",
                             value=shard)  # fmt: skip
        files.add(shard)
    if len(files) > _MOST_SHARDS:
        raise BadAdapter("too many files", field=INDEX, value=len(files),
                         allowed=f"≤ {_MOST_SHARDS}")  # fmt: skip
    return weight_map
