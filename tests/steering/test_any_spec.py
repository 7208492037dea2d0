"""Whatever a request writes about steering: a plan, or an error that names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.errors import BadValue, SteeringError
from steering.method import Limits, Snapshot
from steering.phases import with_ids
from steering.plan import Phase, SteeringPlan
from steering.plugins import discover
from steering.resolve import Resolved, parse, resolve
from steering.spec import Profile, read_steering
from steering.wire import SteeringPayload, pack, unpack
from tests.specs import Spec, Streams, specs
from tests.strange import NOT_FINITE, NUMBERS, SURROGATE, deep, replaced, spoiled, values
from tests.tiers import examples

METHODS = discover()
HEADS = {"base": "lm", "chat": "lm", "plain": "lm", "twin": "lm", "value": "value",
         "kind": "value", "critic": "classifier", "probe": "classifier", "q": "q",
         "early": "lm", "late": "lm"}  # fmt: skip
TAPS = ("early", "late")
SNAPSHOT = Snapshot(HEADS, {"probe": "base"}, dict.fromkeys(TAPS, "base"))
STREAMS = Streams(("chat", "plain", "twin"), ("value", "kind"), ("critic", "probe"), TAPS)
LIMITS = Limits(top_k=8, best_of=8)
PROFILES = {
    "calm": Profile.model_validate(
        {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain",
         "limits": {"strength": [0, 2]}}
    ),
    "mixed": Profile.model_validate({"method": "mix", "weights": {"base": 1, "chat": 0.5}}),
}  # fmt: skip
FIELDS = tuple(
    sorted({field for method in METHODS.values() for field in method.config.model_fields})
)
LONGEST = 1000
"""Letters of an error: a client's megabyte must not come back."""


def ask(asked: object, model_profile: str | None = None) -> Resolved | None:
    """As the server does it."""
    found = read_steering(asked, profiles=PROFILES, limits=LIMITS, model_profile=model_profile)
    if found is None:
        return None
    return resolve(found.spec, methods=METHODS, snapshot=SNAPSHOT, limits=found.limits)


def check_error(error: SteeringError) -> None:
    """It says where and what, in a line that can be sent."""
    assert error.field.split(".")[0] == "steering", error
    text = str(error)
    assert text.startswith(error.field + ": ") and len(text) < LONGEST, text
    text.encode()


def check_plan(plan: SteeringPlan) -> None:
    """What the worker relies on."""
    hash(plan)
    parts: list[SteeringPlan | Phase] = [plan, *plan.phases]
    for part in parts:
        names = [name for name, _ in part.weights]
        assert len(set(names)) == len(names) and all(HEADS[name] in ("lm", "q") for name in names)
        assert all(type(weight) is float and math.isfinite(weight) for _, weight in part.weights)
        assert any(weight for _, weight in part.weights)
        assert 0 <= part.rule.param <= 1 or part.rule.count
    for added in plan.valued:
        assert 1 <= added.top_k <= LIMITS.top_k
        assert all(0 < beta <= LIMITS.strength[1] for _, beta in added.strengths)
    if plan.phases:
        assert plan.search is None and plan.best is None
        texts = with_ids(plan, lambda text: [*text.encode()], ["phases"] * len(plan.phases))
        pack(SteeringPayload(texts, 3, "tag", 1))
    if plan.best is not None:
        assert 1 <= plan.best.n <= LIMITS.best_of
    if plan.search is not None:
        assert 1 <= plan.search.drawn <= LIMITS.best_of
        for proposal in plan.search.proposals:
            check_plan(plan.proposing(proposal))
    payload = SteeringPayload(plan, 3, "tag", 1)
    assert unpack(pack(payload)) == payload


def outcome(asked: object, model_profile: str | None = None) -> None:
    try:
        resolved = ask(asked, model_profile)
    except SteeringError as error:
        check_error(error)
    else:
        if resolved is not None:
            check_plan(resolved.plan)


@given(values(FIELDS, finite=False), st.sampled_from([None, *PROFILES]))
def test_anything_is_a_plan_or_an_error_with_its_field(asked: Any, model: str | None) -> None:
    outcome(asked, model)


@given(specs(STREAMS))
def test_a_sound_object_is_a_plan_that_survives_the_wire_and_its_own_config(spec: Spec) -> None:
    resolved = ask(spec)
    assert resolved is not None
    check_plan(resolved.plan)
    method = METHODS[spec["method"]]
    config = parse(spec, method, SNAPSHOT, LIMITS)
    written = config.model_dump(mode="json", exclude_unset=True)
    assert parse(written, method, SNAPSHOT, LIMITS) == config
    again = ask(written)
    assert again is not None and (again.plan, again.prompts) == (resolved.plan, resolved.prompts)


@settings(max_examples=examples(400))
@given(spoiled(specs(STREAMS), values(FIELDS, finite=False), FIELDS))
def test_one_strange_value_in_a_sound_object(asked: Any) -> None:
    outcome(asked)


def numbers(spec: Spec) -> list[tuple[str, tuple[Any, ...], str]]:
    """(field, path, what is allowed) of a sound object's strengths and weights."""
    found: list[tuple[str, tuple[Any, ...], str]] = []
    if "strength" in spec and "delta_top_p" not in spec:
        found.append(("steering.strength", ("strength",), "[0, 10]"))
    found += [(f"steering.weights.{name}", ("weights", name), "[-10, 10]")
              for name in spec.get("weights", ())]  # fmt: skip
    found += [(f"steering.values.{i}.strength", ("values", i, "strength"), "[0, 10]")
              for i in range(len(spec.get("values", ())))]  # fmt: skip
    found += [(f"steering.rewards.{i}.weight", ("rewards", i, "weight"), "[-10, 10]")
              for i in range(len(spec.get("rewards") or ()))]  # fmt: skip
    return found


@given(
    specs(STREAMS).filter(numbers),
    st.sampled_from((*NUMBERS, *NOT_FINITE)) | st.floats() | st.integers(),
    st.data(),
)
def test_a_number_out_of_range_is_told_with_field_value_and_range(
    spec: Spec, number: Any, data: st.DataObject
) -> None:
    field, path, allowed = data.draw(st.sampled_from(numbers(spec)))
    low, high = (float(end) for end in allowed.strip("[]").split(","))
    if type(number) in (int, float) and low <= number <= high:
        return  # in range: what the object then means is another test's
    with pytest.raises(BadValue) as raised:
        ask(replaced(spec, path, number))
    assert raised.value.field == field
    assert "(got " in str(raised.value)
    if type(number) is float and math.isfinite(number):
        assert raised.value.allowed == allowed and repr(number) in str(raised.value)


@pytest.mark.parametrize("levels", [60, 5000])
def test_deep_values_are_refused_and_not_repeated(levels: int) -> None:
    odd = deep(levels)
    mix = {"method": "mix", "weights": {"base": 1}}
    for asked in (odd, {"method": odd}, {**mix, "weights": odd}, {**mix, "prompts": odd}):
        with pytest.raises(SteeringError) as raised:
            ask(asked)
        check_error(raised.value)


def test_an_error_with_half_a_surrogate_pair_can_still_be_sent() -> None:
    for asked in (SURROGATE, {SURROGATE: 1, "method": "mix"}, {"method": SURROGATE},
                  {"method": "mix", "weights": {SURROGATE: 1}}):  # fmt: skip
        with pytest.raises(SteeringError) as raised:
            ask(asked)
        (str(raised.value) + raised.value.field).encode()


@pytest.mark.parametrize(
    ("spec", "limits", "field"),
    [
        ({"method": "value_augmented", "values": [{"stream": "value"}]}, Limits(top_k=8), "top_k"),
        ({"method": "best_of_n", "value": "value"}, Limits(best_of=8), "n"),
        ({"method": "value_augmented", "top_k": 8, "values": [{"stream": "value"}]},
         Limits(strength=(0, 0.5)), "values.0.strength"),
        *(({**spec, "method": method}, Limits(strength=(0, 0.4)), "strength") for method, spec in (
            ("proxy_tuning", {"expert": "chat", "anti_expert": "plain"}),
            ("emulated_fine_tuning", {"tuned": "chat", "reference": "plain"}),
            ("contrastive", {"amateur": "chat"}),
            ("context_aware", {"without": "chat"}),
            ("guidance", {"negative": "chat"}),
        )),
    ],
)  # fmt: skip
def test_what_a_request_leaves_out_is_inside_the_limits_too(
    spec: Spec, limits: Limits, field: str
) -> None:
    with pytest.raises(BadValue, match=r"out of range .*allowed: ") as raised:
        resolve(spec, methods=METHODS, snapshot=SNAPSHOT, limits=limits)
    assert raised.value.field == f"steering.{field}"


def test_what_is_missing_is_told_before_a_default_that_is_out_of_range() -> None:
    with pytest.raises(BadValue) as raised:
        ask({"method": "best_of_n"})
    assert raised.value.field == "steering.value"


def test_rewards_have_no_strength_to_be_out_of_range() -> None:
    spec = {"method": "emulated_fine_tuning", "reference": "plain",
            "rewards": [{"tuned": "chat", "weight": 0.5}]}  # fmt: skip
    resolve(spec, methods=METHODS, snapshot=SNAPSHOT, limits=Limits(strength=(0, 0.4)))
    with pytest.raises(BadValue, match="do not go together"):
        ask({**spec, "strength": 1.0})
