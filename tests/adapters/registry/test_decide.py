"""The next step, for every combination of what can be true at the same time."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from adapters.registry.decide import decide
from adapters.registry.record import WORKING, Content, Record, State

OLD = Content("a", "1", "/old", digest="0" * 64)
NEW = Content("a", "2", "/new", digest="1" * 64)
STATES: tuple[State, ...] = ("pending", "downloading", "loading", "ready", "failed", "unloading")


def record(state: State, serving: Content | None, owner: str) -> Record:
    return Record(NEW, state, 0.0, 0.0, serving=serving, owner=owner)


@pytest.mark.parametrize("state", STATES)
def test_every_combination_keeps_the_promises(state: State) -> None:
    for serving, here, owner, alive, can in itertools.product(
        (None, OLD, NEW), (None, OLD, NEW), ("me", "other"),
        (None, frozenset({"me"}), frozenset({"me", "other"})), (True, False),
    ):  # fmt: skip
        step = decide(record(state, serving, owner), here=here, replica="me", alive=alive,
                      can_follow=can)  # fmt: skip
        if step == "work":
            assert owner == "me" and state in WORKING
        if step == "take":
            assert (
                owner == "other" and alive == frozenset({"me"}) and state in (*WORKING, "unloading")
            )
        if step == "follow":
            assert can and serving is not None and here != serving and state != "unloading"
        if step == "drop":
            assert here is not None and (state == "unloading" or serving is None)
        if step == "forget":
            assert state == "unloading" and here is None and owner == "me"
        if step == "nothing" and state in WORKING:
            assert owner == "other" and alive != frozenset({"me"})
        if step == "nothing" and state == "ready" and can:
            assert here == serving


def test_without_a_record_what_is_loaded_goes() -> None:
    assert decide(None, here=OLD, replica="me", alive=None) == "drop"
    assert decide(None, here=None, replica="me", alive=None) == "nothing"


def test_labels_are_no_reason_to_load_again() -> None:
    relabelled = msgspec.structs.replace(OLD, version="9", source="/elsewhere")
    found = record("ready", relabelled, "other")
    assert decide(found, here=OLD, replica="me", alive=frozenset()) == "nothing"
    moved = msgspec.structs.replace(OLD, stream="chat")
    found = record("ready", moved, "other")
    assert decide(found, here=OLD, replica="me", alive=frozenset()) == "follow"
