"""Turns pydantic's findings into sentences for people: field, value, allowed range.

Used for request bodies and for the configuration file alike. Needs pydantic only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from steering.errors import BadValue

MAX_REPORTED = 10
"""A body can fail in thousands of places; more than this many lines help nobody."""

_WRAPPERS = frozenset(
    {"function-wrap", "function-after", "function-before", "function-plain", "json-or-python"}
    | {"lax-or-strict", "chain", "default", "nullable", "tagged-union", "union", "call", "none"}
    | {"arguments", "is-instance", "callable", "str", "int", "float", "bool", "bytes", "list"}
    | {"tuple", "dict", "set", "frozenset", "constrained-str", "constrained-int"}
)
"""Segments that pydantic puts into `loc` for its own schema, not for a field of ours."""


_CLASS = re.compile(r"(?:[A-Z][a-z0-9]+){2,}")
"""Names of classes: pydantic names the branch of a union that failed."""


def dotted(loc: Iterable[object], skip: frozenset[str] = frozenset()) -> str:
    """The path of a field as a client would write it: `steering.weights.chat`.

    Args:
        loc: pydantic's `loc`; a leading 'body' is dropped.
        skip: further segments that are not fields (names of union branches).
    """
    parts = [str(part) for part in loc]
    if parts and parts[0] == "body":
        parts = parts[1:]
    kept = [
        part
        for part in parts
        if part not in skip
        and part.lower() not in _WRAPPERS
        and not set(part) & set("[](){}")
        and not _CLASS.fullmatch(part)
    ]
    return ".".join(kept)


def _choices(context: Mapping[str, Any]) -> str:
    return "one of: " + str(context["expected"]).replace(" or ", ", ").replace("'", "")


_SENTENCES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str] | None]] = {
    "missing": ("is required", None),
    "extra_forbidden": ("unknown field", None),
    "finite_number": ("must be a finite number", lambda c: "finite numbers"),
    "greater_than": ("is too small", lambda c: f"more than {c['gt']}"),
    "greater_than_equal": ("is too small", lambda c: f"at least {c['ge']}"),
    "less_than": ("is too large", lambda c: f"less than {c['lt']}"),
    "less_than_equal": ("is too large", lambda c: f"at most {c['le']}"),
    "literal_error": ("is not one of the choices", _choices),
    "enum": ("is not one of the choices", _choices),
    "float_parsing": ("must be a number", lambda c: "a number"),
    "float_type": ("must be a number", lambda c: "a number"),
    "int_parsing": ("must be a whole number", lambda c: "a whole number"),
    "int_type": ("must be a whole number", lambda c: "a whole number"),
    "int_from_float": ("must be a whole number", lambda c: "a whole number"),
    "bool_type": ("must be true or false", lambda c: "true, false"),
    "bool_parsing": ("must be true or false", lambda c: "true, false"),
    "string_type": ("must be a string", lambda c: "a string"),
    "list_type": ("must be a list", lambda c: "a list"),
    "tuple_type": ("must be a list", lambda c: "a list"),
    "dict_type": ("must be an object", lambda c: "an object"),
    "model_type": ("must be an object", lambda c: "an object"),
    "model_attributes_type": ("must be an object", lambda c: "an object"),
    "string_pattern_mismatch": (
        "has another form",
        lambda c: f"what the pattern {c['pattern']} matches",
    ),
    "too_short": ("has too few items", lambda c: f"at least {c['min_length']}"),
    "too_long": ("has too many items", lambda c: f"at most {c['max_length']}"),
    "string_too_short": ("is too short", lambda c: f"at least {c['min_length']} characters"),
    "string_too_long": ("is too long", lambda c: f"at most {c['max_length']} characters"),
}


def _shown(value: object) -> object:
    """A value that is safe to repeat: containers can be megabytes long."""
    if isinstance(value, (list, tuple, dict)):
        size = len(value)
        return value if size <= 4 else f"{type(value).__name__} of {size} items"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def problem(error: Mapping[str, Any], field: str) -> BadValue:
    """One pydantic finding as an error of ours.

    Args:
        error: an element of `ValidationError.errors()`.
        field: the path to report.
    """
    kind, context = str(error["type"]), error.get("ctx") or {}
    cause = context.get("error")
    if isinstance(cause, BadValue):
        return cause
    if kind in ("missing", "extra_forbidden"):
        return BadValue(_SENTENCES[kind][0], field=field)
    value = _shown(error.get("input"))
    if cause is not None:  # a validator of ours (or vLLM's) raised ValueError(sentence)
        return BadValue(str(cause), field=field, value=value)
    sentence, allowed = _SENTENCES.get(kind, (str(error["msg"]), None))
    return BadValue(
        sentence, field=field, value=value, allowed=allowed(context) if allowed else None
    )


def _best_branch(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The findings without those of union branches that the value was never meant for.

    A message with role `user` fails the branches of all other roles with a `literal_error`;
    only the branch whose literals fit says what is wrong.
    """
    wrong = {tuple(e["loc"][:-1]) for e in errors if e["type"] == "literal_error" and e.get("loc")}
    fitting = [
        e
        for e in errors
        if not any(tuple(e.get("loc", ())[: len(branch)]) == branch for branch in wrong if branch)
    ]
    return fitting or list(errors)


def problems(
    errors: Sequence[Mapping[str, Any]], prefix: str = "", skip: frozenset[str] = frozenset()
) -> list[BadValue]:
    """All findings, at most `MAX_REPORTED`, each with its dotted path.

    Args:
        errors: `ValidationError.errors()`.
        prefix: put in front of every path, e.g. `steering`.
        skip: see `dotted`.
    """
    bad_values = []
    for error in _best_branch(errors)[:MAX_REPORTED]:
        path = dotted(error.get("loc", ()), skip)
        bad_values.append(
            problem(error, ".".join(part for part in (prefix, path) if part) or "body")
        )
    return bad_values


DEEPEST = 100
"""Levels of a body. The parser takes as many as its stack has left, and what looks at the body
later has less of it left."""


def too_deep(raw: bytes, body: object) -> bool:
    """Whether a body is nested more deeply than `DEEPEST`.

    Args:
        raw: the bytes that `body` was parsed from; without enough brackets it is not looked at.
        body: the parsed JSON.
    """
    if not isinstance(body, dict | list) or raw.count(b"[") + raw.count(b"{") <= DEEPEST:
        return False
    level: list[Any] = [body]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
