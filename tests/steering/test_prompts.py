"""The request's prompt is as long as the longest of its streams'."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import BadValue
from steering.plan import SteeringPlan
from steering.prompts import align

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=20)


def plan(**prompts: list[int]) -> SteeringPlan:
    weights = (("base", 1.0), ("chat", 0.5), ("plain", -0.5))
    return SteeringPlan(
        "mix", weights, prompts=tuple((s, tuple(ids)) for s, ids in sorted(prompts.items()))
    )


@given(IDS, IDS, IDS)
def test_the_prompt_becomes_as_long_as_the_longest(
    base: list[int], chat: list[int], plain: list[int]
) -> None:
    ids, pad = align(base, plan(chat=chat, plain=plain))
    assert len(ids) == max(map(len, (base, chat, plain)))
    assert ids == [base[0]] * pad + base
    assert set(ids) == set(base)


@given(IDS)
def test_a_prompt_without_longer_streams_is_left_alone(base: list[int]) -> None:
    assert align(base, plan()) == (base, 0)
    assert align(base, plan(chat=[1])) == (base, 0)


def test_a_stream_that_does_not_run_needs_no_room() -> None:
    assert align([5], plan(twin=[1, 2, 3])) == ([5], 0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadValue, match="no tokens"):
        align([], plan())
