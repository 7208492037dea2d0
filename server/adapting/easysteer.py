"""EasySteer's request field `vectors` as entries of `adapters`.

Its vectors are named by paths, ours by the names of registered adapters; what a vector is and which
layers it changes is in the adapter's files. `apply` says where a vector acts. What cannot be said
of an adapter is refused. Fields as in ZJU-REAL/EasySteer 312c6d8 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from steering.adapter_ref import AdapterRef
from steering.errors import BadValue
from steering.where import MANY

_KEYS = ("name", "source", "algorithm", "scale", "layers", "normalize", "apply", "params")
_ALGORITHMS = ("direct", "loreft")
_APPLY = "prompt: all, prompt_positions at one end, prompt_window from 0, generation: all"


def refs_of(vectors: Sequence[Any]) -> list[AdapterRef]:
    """The adapters that `vectors` stands for.

    Raises:
        BadValue: something of it has no equal among adapters.
    """
    return [_ref(one, f"vectors.{i}") for i, one in enumerate(vectors)]


def _ref(vector: Any, field: str) -> AdapterRef:
    if not isinstance(vector, Mapping):
        raise BadValue("not an object", field=field, value=vector)
    for key in vector:
        if key not in _KEYS:
            raise BadValue("has no equal among adapters", field=f"{field}.{key}",
                           value=vector[key], allowed=", ".join(_KEYS))  # fmt: skip
    if (algorithm := vector.get("algorithm", "direct")) not in _ALGORITHMS:
        raise BadValue("not served", field=f"{field}.algorithm", value=algorithm,
                       allowed=", ".join(_ALGORITHMS))  # fmt: skip
    for key, only in (("layers", None), ("normalize", False), ("params", None)):
        if vector.get(key, only) not in (only, {}):
            raise BadValue("not served: the adapter's files say all of it", field=f"{field}.{key}",
                           value=vector[key], allowed=f"{only}")  # fmt: skip
    name = vector.get("name") or vector.get("source")
    where = _where(vector.get("apply"), f"{field}.apply")
    try:
        return AdapterRef(name=name, weight=vector.get("scale", 1.0), where=where)
    except ValidationError as error:
        first = error.errors()[0]
        key = {"name": "name", "weight": "scale"}.get(str(first["loc"][0]), "")
        raise BadValue(first["msg"], field=f"{field}.{key}", value=first["input"]) from error


def _where(apply: Any, field: str) -> dict[str, int]:
    """What `apply` says, which EasySteer asks for."""
    if not isinstance(apply, Mapping) or not apply:
        raise BadValue("says no positions", field=field, value=apply, allowed=_APPLY)
    found: dict[str, int] = {}
    for key, value in apply.items():
        if key == "prompt" and value == "all":
            own = {"prompt_first": MANY}
        elif key == "generation" and value == "all":
            own = {"from": 0}
        elif key == "prompt_window" and _is_window(value):
            own = {"prompt_first": value[1]}
        elif key == "prompt_positions" and (ends := _ends(value)) is not None:
            own = ends
        else:
            raise BadValue("not served", field=f"{field}.{key}", value=value, allowed=_APPLY)
        if own.keys() & found.keys():
            raise BadValue("not served together", field=f"{field}.{key}", value=value)
        found |= own
    return found


def _is_window(value: Any) -> bool:
    whole = isinstance(value, Sequence) and len(value) == 2 and all(type(v) is int for v in value)
    return whole and value[0] == 0 and value[1] >= 0


def _ends(value: Any) -> dict[str, int] | None:
    """Positions 0, 1, … or −1, −2, …, in any order; None for others."""
    if not isinstance(value, Sequence) or not value or not all(type(v) is int for v in value):
        return None
    positions = sorted(value)
    if positions == list(range(len(positions))):
        return {"prompt_first": len(positions)}
    return {"prompt_last": len(positions)} if positions == list(range(-len(positions), 0)) else None
