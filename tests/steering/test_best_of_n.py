"""What best_of_n resolves to: how replies are drawn, and how each is read."""

from __future__ import annotations

from typing import Any

import pytest

from steering.errors import BadValue
from steering.method import Limits, Snapshot
from steering.plan import BASE, AdapterUse, Best, SteeringPlan
from steering.plugins import discover
from steering.resolve import Resolved, resolve
from steering.wire import SteeringPayload

SNAPSHOT = Snapshot(
    {"base": "lm", "chat": "lm", "value": "value", "probe": "classifier", "judge": "classifier"},
    {"probe": "base", "judge": "chat"},
)
BEST = {"method": "best_of_n", "n": 4, "value": "value"}


def run(**changes: Any) -> Resolved:
    spec = {**BEST, **changes}
    return resolve(spec, methods=discover(), snapshot=SNAPSHOT, limits=Limits(best_of=8))


def test_a_reply_is_drawn_from_the_base_and_read_by_the_head_alone() -> None:
    plan = run(report=True).plan
    assert plan.best == Best("value", 4, "value")
    assert plan.steers and plan.streams == ("value",)
    assert plan.drawing == SteeringPlan("best_of_n", report="summary")
    assert not plan.drawing.steers
    reading = SteeringPlan("best_of_n", (), report="summary", bodies=("value",), heads=("value",))
    assert plan.scoring == reading
    assert plan.scoring.streams == ("value",)


@pytest.mark.parametrize(("head", "body"), [("probe", BASE), ("judge", "chat")])
def test_a_head_on_a_stream_reads_that_stream(head: str, body: str) -> None:
    scoring = run(value=head).plan.scoring
    assert (scoring.bodies, scoring.heads) == ((body,), (head,))


def test_adapters_are_there_when_replies_are_drawn_and_when_they_are_read() -> None:
    use = (AdapterUse("d" * 64),)
    plan = SteeringPlan("best_of_n", adapters=use, best=Best("value", 2, "value"))
    assert plan.drawing.adapters == plan.scoring.adapters == use


def test_caches_of_requests_without_the_base_are_apart() -> None:
    """Where the base did not run its KV is not there, whatever else did."""
    beside = SteeringPlan("value_augmented", bodies=("value",))
    alone = run().plan.scoring
    assert alone.streams == beside.streams
    assert alone.cache_key(0) != beside.cache_key(0)
    assert run(value="probe").plan.scoring.cache_key(0) == ""  # reads what the base has written


def test_a_prompt_of_its_own_is_for_reading_only() -> None:
    plan = run(prompts={"value": {"token_ids": [1]}}).with_prompts({"value": (7, 8, 9)})
    assert plan.drawing.prompts == ()
    assert plan.scoring.prompts == (("value", (7, 8, 9)),)
    judged = run(value="judge", prompts={"chat": {"prompt": "a"}}).with_prompts({"chat": (7,)})
    assert judged.scoring.prompts == (("chat", (7,)),)
    with pytest.raises(BadValue, match="a head on chat reads what chat reads") as caught:
        run(value="judge", prompts={"judge": {"prompt": "a"}})
    assert caught.value.field == "steering.prompts.judge"


def test_the_server_s_limit_holds() -> None:
    assert run(n=8).plan.best == Best("value", 8, "value")
    with pytest.raises(BadValue, match=r"steering.n: .*\(got 9\); allowed: 1 to 8"):
        run(n=9)


def test_what_lacks_a_head_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(BadValue, match="one of: judge, probe, value") as caught:
        run(value="chat")
    assert caught.value.field == "steering.value"


def test_a_token_report_tells_values_where_values_steer() -> None:
    spec: dict[str, Any] = {"method": "value_augmented", "values": [{"stream": "value"}]}
    for report, heads in ((False, ()), (True, ()), ("tokens", ("value",))):
        found = resolve(
            {**spec, "report": report}, methods=discover(), snapshot=SNAPSHOT, limits=Limits()
        )
        assert found.plan.heads == heads


def test_an_earlier_reply_is_no_part_of_the_prompts_that_are_compared() -> None:
    plan = SteeringPlan("x", (), prompts=(("value", (1, 2, 3)),), bodies=("value",))
    prompt, reply = 10, 5
    assert SteeringPayload(plan, reply=reply).shared_tokens(prompt) == 3
    assert (
        SteeringPayload(SteeringPlan("x", (), bodies=("value",)), reply=reply).shared_tokens(10)
        is None
    )
