"""Maps pydantic's errors to ours, with field, value and allowed range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from steering.errors import BadValue, NotFound, SteeringError

_MISSING = object()

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def fault(
    error: ValidationError, given: object, model: type[BaseModel], field: str
) -> SteeringError:
    """The first fault of a failed validation.

    Args:
        error: what pydantic raised.
        given: the value that was validated.
        model: the model it was validated against.
        field: where `given` stands, e.g. `steering`.

    Returns:
        `NotFound` for a stream name that does not exist, else `BadValue`; to be raised.
    """
    details: Sequence[Any] = error.errors(include_url=False)
    # What is written comes before defaults that this server does not allow.
    written = (d for d in details if not _left_out(d, given) and not _follows(d, details))
    first = next(written, details[0])
    path, value = _locate(first["loc"], given)
    where = ".".join((field, *path))
    if first["type"] == "missing":
        return BadValue("the field is required", field=where)
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(model.model_fields)) if len(path) == 1 else None
        return BadValue("unknown field", field=where, value=value, allowed=known)
    if first["type"] == "unknown_stream":
        # In a mapping the name itself is at fault, not what stands beside it.
        name = first["loc"][-2] if first["loc"][-1] == "[key]" else value
        return NotFound(first["msg"], field=where, value=name, allowed=first["ctx"].get("allowed"))
    same_place = [d for d in details if _locate(d["loc"], given)[0] == path]
    message = "; or ".join(dict.fromkeys(_message(detail) for detail in same_place))
    if _left_out(first, given):
        message, value = f"{message} where it is left out", first["input"]
    return BadValue(message, field=where, value=value, allowed=_allowed(first))


def _left_out(detail: Mapping[str, Any], given: object) -> bool:
    """Whether a default of the method's is at fault: a number that was not written."""
    return (
        detail["type"] != "missing"
        and isinstance(detail["input"], int | float)
        and _locate(detail["loc"], given)[1] is None
    )


def _follows(detail: Mapping[str, Any], details: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something inside is at fault too: pydantic counts a list without its bad items."""
    loc = detail["loc"]
    return any(len(d["loc"]) > len(loc) and d["loc"][: len(loc)] == loc for d in details)


def _locate(loc: Sequence[int | str], given: object) -> tuple[list[str], object]:
    """The path inside `given` and the value there.

    Pydantic's `loc` also names the branch of a union that failed, and says `[key]` for the key
    of a mapping; neither is part of what the caller wrote.
    """
    path: list[str] = []
    value = given
    for part in loc:
        if isinstance(value, Mapping) and part != "[key]":
            value = value.get(part, _MISSING)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            break
        path.append(str(part))
    return path, None if value is _MISSING else value


def _message(detail: Mapping[str, Any]) -> str:
    message: str = detail["msg"]
    return message.removeprefix("Value error, ")


def _allowed(detail: Mapping[str, Any]) -> str | None:
    context = detail.get("ctx", {})
    if isinstance(context.get("allowed"), str):
        return str(context["allowed"])
    if "expected" in context:
        return str(context["expected"])
    bounds = [f"{sign} {context[name]:g}" for name, sign in _BOUNDS.items() if name in context]
    return ", ".join(bounds) or None
