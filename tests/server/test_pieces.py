"""Long lists are made in pieces and are the JSON that they would be at once."""

from __future__ import annotations

import json

import pytest

from server.pieces import PIECE, json_list, shortened


@pytest.mark.parametrize("count", [0, 1, PIECE, PIECE + 1, 5 * PIECE])
@pytest.mark.parametrize("left_out", [set(), {0}, set(range(PIECE)), set(range(5 * PIECE))])
async def test_it_is_the_same_json(count: int, left_out: set[int]) -> None:
    shown = [None if i in left_out else {"i": i, "text": "ü \"'\n"} for i in range(count)]
    answer = json_list("all", range(count), lambda i: shown[i], {"rest": [1, None]})
    pieces = [piece async for piece in answer.body_iterator]
    assert len(pieces) <= count / PIECE + 2
    text = "".join(p if isinstance(p, str) else bytes(p).decode() for p in pieces)
    assert json.loads(text) == {"all": [one for one in shown if one], "rest": [1, None]}


def test_a_sentence_has_some_names_of_many() -> None:
    assert shortened(["a", "b"]) == "a, b"
    assert shortened([str(i) for i in range(10_000)]).endswith("18, 19 and 9980 more")
