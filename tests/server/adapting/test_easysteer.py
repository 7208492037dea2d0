"""EasySteer's field `vectors` as adapters, and what of it has no equal."""

from __future__ import annotations

from typing import Any

import pytest

from server.adapting.easysteer import refs_of
from steering.errors import BadValue
from steering.where import MANY

EVERYWHERE = {"prompt": "all", "generation": "all"}


def vector(**more: Any) -> dict[str, Any]:
    return {"name": "v", "apply": EVERYWHERE} | more


@pytest.mark.parametrize(
    ("apply", "where"),
    [
        (EVERYWHERE, {"prompt_first": MANY, "from": 0}),
        ({"prompt": "all"}, {"prompt_first": MANY}),
        ({"generation": "all"}, {"from": 0}),
        ({"prompt_positions": [-1], "generation": "all"}, {"prompt_last": 1, "from": 0}),
        ({"prompt_positions": [-2, -1, -3]}, {"prompt_last": 3}),
        ({"prompt_positions": [0, 1]}, {"prompt_first": 2}),
        ({"prompt_window": [0, 9]}, {"prompt_first": 9}),
    ],
)
def test_what_maps(apply: Any, where: Any) -> None:
    (ref,) = refs_of([{"source": "v", "scale": 2, "algorithm": "direct", "normalize": False,
                       "layers": None, "apply": apply}])  # fmt: skip
    assert (ref.name, ref.weight, ref.where) == ("v", 2.0, where)


@pytest.mark.parametrize(
    ("one", "field"),
    [
        (3, r"vectors\.0:"),
        (vector(data=[1.0]), r"vectors\.0\.data"),
        (vector(algorithm="erase"), r"vectors\.0\.algorithm"),
        (vector(layers=[3]), r"vectors\.0\.layers"),
        (vector(normalize=True), r"vectors\.0\.normalize"),
        (vector(params={"a": 1}), r"vectors\.0\.params"),
        (vector(name=None), r"vectors\.0\.name"),
        (vector(scale="2"), r"vectors\.0\.scale"),
        ({"name": "v"}, r"vectors\.0\.apply"),
        (vector(apply={"prompt_tokens": [5]}), r"vectors\.0\.apply\.prompt_tokens"),
        (vector(apply={"prompt_positions": [3]}), r"vectors\.0\.apply\.prompt_positions"),
        (vector(apply={"prompt_window": [1, 3]}), r"vectors\.0\.apply\.prompt_window"),
        (vector(apply={"exclude_prompt_tokens": [1]}), r"vectors\.0\.apply\.exclude_prompt_tokens"),
        (vector(apply={"prompt": "all", "prompt_window": [0, 3]}), r"apply\.prompt_window"),
        (vector(apply={"generation_window": [0, 3]}), r"apply\.generation_window"),
    ],
)
def test_what_does_not_map_is_named(one: Any, field: str) -> None:
    with pytest.raises(BadValue, match=field):
        refs_of([one])
