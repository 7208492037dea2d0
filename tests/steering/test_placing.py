"""Where adapters act, as far as tokens decide: texts, and an aLoRA's invocation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from adapters.errors import BadAdapter
from adapters.formats.artefact import Artefact
from adapters.where import MANY, REPLY, Text, Where, read_where
from steering.adapters import ResolvedAdapter, adapt
from steering.errors import BadValue
from steering.placing import invoked, placed, with_text_ids
from steering.plan import AdapterUse, SteeringPlan
from steering.wire import SteeringPayload, pack, unpack

IDS = {"</t>": [8, 9], "<t>": [7], "x": [5]}
AFTER = Where(stop=MANY, after=Text("x"))


def plan(*wheres: Where) -> SteeringPlan:
    return SteeringPlan("base", adapters=(AdapterUse("a", where=wheres),))


def alora(*ids: int, stream: str = "base") -> SteeringPlan:
    return SteeringPlan("base", adapters=(AdapterUse("a", stream, invocation=ids),))


def test_words() -> None:
    assert read_where({"after": "x"}, "w") == AFTER
    assert read_where({"until": "x", "from": 2}, "w") == Where(start=2, stop=MANY, until=Text("x"))
    assert read_where({"after": "x", "first": 9}, "w") == Where(stop=9, after=Text("x"))
    assert not AFTER.everywhere and AFTER.shared(40) == 40


@pytest.mark.parametrize(
    "value",
    [{"after": ""}, {"after": 3}, {"until": 65 * "a"}, {"after": "a", "prompt_last": 1},
     {"after": "a", "halved": True}],
)  # fmt: skip
def test_words_that_are_none(value: object) -> None:
    with pytest.raises(BadAdapter, match="w"):
        read_where(value, "w")


def test_a_text_opens_and_closes() -> None:
    ahead, lengths = np.arange(-2, 6), np.full(8, 2)
    seen: dict[tuple[int, ...], npt.NDArray[np.int64]] = {(5,): np.full(8, 3, np.int64)}
    after, until = Text("x", (5,)), Text("x", (5,))
    found = Where(stop=MANY, after=after).active(ahead, lengths, seen)
    assert found.tolist() == [False] * 5 + [True] * 3
    found = Where(stop=MANY, until=until).active(ahead, lengths, seen)
    assert found.tolist() == [False] * 2 + [True] * 3 + [False] * 3
    found = Where(start=1, stop=5, after=after).active(ahead, lengths, seen)
    assert found.tolist() == [False] * 5 + [True] * 2 + [False]


def test_texts_get_the_base_s_tokens() -> None:
    closer = Where(stop=MANY, until=Text("</t>"))
    found = with_text_ids(plan(AFTER, closer), IDS.__getitem__)
    (use,) = found.adapters
    assert use.where[0].after == Text("x", (5,))
    assert use.where[1].until == Text("</t>", (8, 9), (7,))
    with pytest.raises(BadValue, match="adapters"):
        with_text_ids(plan(AFTER), lambda _: [1] * 17)
    payload = SteeringPayload(found, salt="s")
    assert unpack(pack(payload)) == payload


def test_what_the_prompt_has_closed() -> None:
    text = Text("</t>", (8, 9), (7,))
    after, until = Where(stop=MANY, after=text), Where(stop=MANY, until=text)
    for prompt, closed in (([7, 1, 8, 9], True), ([8, 9, 7], False), ([8, 9], False)):
        found = placed(plan(after), prompt).adapters
        assert found == (AdapterUse("a", where=(REPLY if closed else after,)),)
        found = placed(plan(until), prompt).adapters
        assert found == (() if closed else (AdapterUse("a", where=(until,)),))


def test_an_invocation_s_last_occurrence() -> None:
    (use,) = placed(alora(3, 4), [3, 4, 1, 3, 4, 3, 1]).adapters
    assert use.where == (Where(last=4, stop=MANY),)
    assert placed(alora(3, 4), [3, 1, 4]).adapters == ()
    assert invoked(alora(3, 4), [3, 4]) and not invoked(alora(3, 4), [4, 3])
    own = SteeringPlan(
        "g", prompts=(("twin", (1, 3, 4)),), adapters=alora(3, 4, stream="twin").adapters
    )
    (use,) = placed(own, [9, 9, 9, 9]).adapters
    assert use.where == (Where(last=2, stop=MANY),)


def test_those_beside_stay_as_they_are() -> None:
    others = (
        AdapterUse("b"),
        AdapterUse("c", where=(REPLY,)),
        AdapterUse("d", where=(Where(last=1),)),
    )
    found = placed(SteeringPlan("base", adapters=(*alora(3).adapters, *others)), [3, 1]).adapters
    assert found[1:] == others and len(found) == 4


def test_how_much_is_the_base_s_own() -> None:
    found = placed(alora(3, 4), [1] * 50 + [3, 4] + [1] * 8)
    assert SteeringPayload(found).untouched_tokens(60) == 50
    assert SteeringPayload(found, pad=2).untouched_tokens(60) == 0
    both = SteeringPlan("base", adapters=(*found.adapters, AdapterUse("b")))
    assert SteeringPayload(both).untouched_tokens(60) == 0


def test_an_alora_is_the_base_s() -> None:
    artefact = Artefact(Path(), "lora", ("a",), ({},), {}, (), invocation=(3,))
    owners = {"base": "base", "twin": "base", "chat": "chat"}
    for stream, field in (("chat", "adapters.stream"), ("twin", "")):
        one = ResolvedAdapter(artefact, "d", stream)
        if field:
            with pytest.raises(BadValue, match=field):
                adapt(SteeringPlan("base"), [one], owners)
    with pytest.raises(BadValue, match=r"adapters\.where"):
        adapt(SteeringPlan("base"), [ResolvedAdapter(artefact, "d", where=REPLY)], owners)
