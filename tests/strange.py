"""What strangers may send: values of every kind that JSON and YAML have, the odd ones often."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import strategies as st

NUMBERS: tuple[Any, ...] = (
    0, -0.0, 1, -1, 0.5, 1e-300, 5e-324, 1e308, -1e308, 3.5e38, 2**31, -(2**31) - 1, 2**53 + 1,
    2**63, -(2**63) - 1, 2**64, 10**400, -(10**400), True, False,
)  # fmt: skip
"""Numbers at the edges of the types that they end up in, and booleans, which Python counts too."""

NOT_FINITE = (math.nan, math.inf, -math.inf)

TEXTS = (
    "", " ", "0", "1.0", "true", "null", "NaN", "base", "a" * 5000, "é\u0301", "𝔘", "\u202e",
    "\x00", "\x1b[2J", "%s{0}", "../..", "__class__", "'\";--", "\N{ZERO WIDTH SPACE}", "\r\nx: y",
)  # fmt: skip

SURROGATE = "\ud83d"
"""Half a pair: Python has such texts, UTF-8 does not."""


def deep(levels: int) -> Any:
    """Lists and objects in each other."""
    value: Any = 0
    for level in range(levels):
        value = [value] if level % 2 else {"x": value}
    return value


def leaves(finite: bool = True) -> st.SearchStrategy[Any]:
    """Values without parts."""
    odd = (*NUMBERS, *TEXTS, None, *(() if finite else NOT_FINITE))
    return (
        st.sampled_from(odd)
        | st.integers()
        | st.floats(allow_nan=not finite, allow_infinity=not finite)
        | st.text(max_size=12)
    )


def values(names: tuple[str, ...] = (), *, finite: bool = True) -> st.SearchStrategy[Any]:
    """Any value of JSON.

    Args:
        names: keys that objects have often.
        finite: leave out NaN and the infinities, which Python's parser reads too.
    """
    keys = st.text(max_size=6) | st.sampled_from((*names, "method", "x", ""))
    return st.recursive(
        leaves(finite),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=10,
    ) | st.sampled_from([deep(20), [[]], {}, []])


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document, itself included."""
    found = [at]
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, Mapping):
        parts = document.items()
    elif isinstance(document, list | tuple):
        parts = enumerate(document)
    for key, value in parts:
        found += places(value, (*at, key))
    return found


def replaced(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value at one place."""
    if not at:
        return value
    if isinstance(document, Mapping):
        return {**document, at[0]: replaced(document.get(at[0]), at[1:], value)}
    copy = list(document)
    copy[at[0]] = replaced(copy[at[0]], at[1:], value)
    return copy


@st.composite
def spoiled(
    draw: st.DrawFn,
    sound: st.SearchStrategy[Any],
    odd: st.SearchStrategy[Any] | None = None,
    keys: tuple[str, ...] = ("x",),
) -> Any:
    """A sound document with one strange value, in the place of another or beside it.

    Args:
        draw: Hypothesis's.
        sound: documents.
        odd: what is put in; default: `values()`.
        keys: for what is put in beside.
    """
    document = draw(sound)
    at = draw(st.sampled_from(places(document)))
    value = draw(values(keys) if odd is None else odd)
    there = document
    for key in at:
        there = there[key]
    if isinstance(there, Mapping) and draw(st.booleans()):
        at = (*at, draw(st.sampled_from(keys)))
    return replaced(document, at, value)
