"""Long lists in pieces: with thousands of entries others get their turn in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

from starlette.responses import StreamingResponse

T = TypeVar("T")

PIECE = 100
"""Entries that are made at a time."""

_SHOWN = 20
"""Names of a long list that a sentence has."""


def in_pieces(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    """A list, a piece at a time."""
    return (entries[i : i + PIECE] for i in range(0, len(entries), PIECE))


def json_list(
    key: str, entries: Sequence[T], to_json: Callable[[T], Any], rest: dict[str, Any]
) -> StreamingResponse:
    """A JSON object with a long list.

    Args:
        key: of the list.
        entries: what it is made of.
        to_json: an entry as JSON has it; None: it is left out.
        rest: the object's other values; at least one.
    """

    async def text() -> AsyncIterator[str]:
        begun = f"{{{json.dumps(key)}:["
        for piece in in_pieces(entries):
            values = [value for value in map(to_json, piece) if value is not None]
            if values:
                yield begun + _dumped(values)[1:-1]
                begun = ","
            await asyncio.sleep(0)  # sending alone lets nobody else have a turn
        yield ("" if begun == "," else begun) + "]," + _dumped(rest)[1:]

    return StreamingResponse(text(), media_type="application/json")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def shortened(names: Sequence[str]) -> str:
    """Names for a sentence: the first of them, and how many there are more."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
