"""From spec to plan: what is kept, what is refused, and what the refusal says."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import BadValue, NotFound
from steering.method import Limits, Logits, Method, MethodConfig, Snapshot
from steering.plan import Recipe, Rule, RuleKind, SteeringPlan, Values
from steering.plugins import discover
from steering.resolve import Resolved, check_profile, resolve
from steering.spec import Profile

METHODS = discover()
SNAPSHOT = Snapshot({"base": "lm", "chat": "lm", "plain": "lm", "twin": "lm", "value": "value"})
PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}


def run(spec: Mapping[str, Any], limits: Limits | None = None) -> Resolved:
    return resolve(spec, methods=METHODS, snapshot=SNAPSHOT, limits=limits or Limits())


class FreeConfig(MethodConfig):
    """Whatever recipe a test wants."""

    method: Literal["free"]
    weights: dict[str, float]
    rule: str = "base"
    param: float = 0.5
    kind: int = 0
    candidates: int | None = None


class Free(Method[FreeConfig]):
    """A method that checks nothing itself."""

    name = "free"
    config = FreeConfig

    def resolve(self, config: FreeConfig, _snapshot: Snapshot) -> Recipe:
        """The recipe as written."""
        weights = {name: 1e999 if c == 1e300 else c for name, c in config.weights.items()}
        rule = Rule(RuleKind(config.kind), config.rule, config.param)
        many = config.candidates
        return Recipe(weights, rule, None if many is None else Values((("value", 1.0),), many))

    def reference(self, config: FreeConfig, logits: Mapping[str, Logits]) -> Logits:
        """Not used."""
        raise NotImplementedError


def free(**spec: Any) -> SteeringPlan:
    return resolve(
        {"method": "free", **spec},
        methods={"free": Free()},
        snapshot=SNAPSHOT,
        limits=Limits(),
    ).plan


def test_a_plan_lists_the_base_first_then_by_name_without_zeros() -> None:
    plan = free(weights={"plain": -1, "twin": 0.0, "chat": 2.0})
    assert plan == SteeringPlan("free", (("base", 0.0), ("chat", 2.0), ("plain", -1.0)))
    assert repr(free(weights={"base": -0.0, "chat": 1})) == repr(free(weights={"chat": 1.0}))


def test_a_method_that_checks_nothing_gets_no_more_candidates_than_the_server_allows() -> None:
    most = Limits().top_k
    plan = free(weights={"base": 1}, candidates=most)
    assert plan.values is not None and plan.values.top_k == most
    for wrong in (0, most + 1):
        with pytest.raises(BadValue, match=f"too many or too few candidates .*1 to {most}"):
            free(weights={"base": 1}, candidates=wrong)


def test_a_sum_forgets_the_rules_arguments() -> None:
    assert free(weights={"chat": 1}, rule="chat", param=0.9) == free(weights={"chat": 1})


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"weights": {"base": 0}}, "all weights are 0"),
        ({"weights": {}}, "all weights are 0"),
        ({"weights": {"chat": 1e300}}, "not finite"),
        ({"weights": {"base": 1, "value": 1}}, "value head"),
        ({"weights": {"base": 1}, "kind": 2, "rule": "chat"}, "no weight"),
        ({"weights": {"base": 1, "chat": 0}, "kind": 2, "rule": "chat"}, "no weight"),
        ({"weights": {"base": 1}, "kind": 1, "param": 0}, "out of range"),
    ],
)
def test_a_careless_methods_recipe_is_refused(spec: dict[str, Any], match: str) -> None:
    with pytest.raises(BadValue, match=match):
        free(**spec)


def test_a_careless_methods_unknown_stream_is_named() -> None:
    with pytest.raises(NotFound, match="one of: base, chat, plain, twin, value") as caught:
        free(weights={"nobody": 1})
    assert caught.value.field == "steering.weights.nobody"


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(NotFound, match=r"steering.method: .*'magic'.*contrastive, .*mix") as e:
        run({"method": "magic"})
    assert e.value.field == "steering.method"


@pytest.mark.parametrize("spec", [{}, {"method": None}, {"method": 3}, {"expert": "chat"}])
def test_an_object_without_a_method_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match="one of: ") as caught:
        run(spec)
    assert caught.value.field == "steering.method"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"strength": 11}, "strength: the strength is out of range (got 11); allowed: [0, 10]"),
        ({"expert": "nobody"}, "expert: no such stream (got 'nobody'); allowed: one of: base,"),
        ({"alpha": 1}, "alpha: unknown field (got 1); allowed: anti_expert, expert,"),
        ({"expert": None}, "expert: Input should be a valid string"),
        ({"expert": ""}, "expert: String should have at least 1 character"),
        ({"report": "all"}, "report: "),
    ],
)
def test_a_refusal_names_field_value_and_range(change: dict[str, Any], text: str) -> None:
    with pytest.raises((BadValue, NotFound)) as caught:
        run({**PROXY, **change})
    assert f"steering.{text}" in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ({"nobody": {"prompt": "x"}}, "nobody: no such stream (got 'nobody')"),
        ({"base": {"prompt": "x"}}, "base: the request's own prompt"),
        ({"twin": {"prompt": "x"}}, "twin: the plan does not use"),
        ({"chat": {"prompt": "x", "token_ids": [1]}}, "chat: give exactly one"),
        ({"chat": {"promt": "x"}}, "chat.promt: unknown field"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(prompts: dict[str, Any], text: str) -> None:
    with pytest.raises((BadValue, NotFound)) as caught:
        run({**PROXY, "prompts": prompts})
    assert f"steering.prompts.{text}" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["strength", "weight", "nested"])
def test_numbers_that_are_not_finite_are_refused(value: float, kind: str) -> None:
    rewards = [{"tuned": "chat", "weight": value}]
    specs: dict[str, dict[str, Any]] = {
        "strength": {**PROXY, "strength": value},
        "weight": {"method": "mix", "weights": {"chat": value}},
        "nested": {"method": "emulated_fine_tuning", "rewards": rewards, "reference": "plain"},
    }
    with pytest.raises(BadValue, match="finite"):
        run(specs[kind])


def test_an_unknown_stream_is_refused_also_at_strength_zero() -> None:
    with pytest.raises(NotFound):
        run({**PROXY, "expert": "nobody", "strength": 0})


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 20))
def test_strengths_outside_the_limits_never_pass(value: float, low: float, width: float) -> None:
    limits = Limits(strength=(low, low + width))
    if low <= value <= low + width:
        weights = dict(run({**PROXY, "strength": value}, limits).plan.weights)
        assert weights.get("chat", 0) == (value if abs(value) > 1e-45 else pytest.approx(value))
    else:
        with pytest.raises(BadValue) as caught:
            run({**PROXY, "strength": value}, limits)
        assert caught.value.field == "steering.strength"


WEIGHTS = st.dictionaries(
    st.sampled_from(["base", "chat", "plain", "twin"]), st.floats(-10, 10), min_size=1
).filter(lambda weights: any(abs(weight) > 1e-40 for weight in weights.values()))


@given(WEIGHTS)
def test_resolving_is_pure_and_independent_of_order(weights: dict[str, float]) -> None:
    spec = {"method": "mix", "weights": weights}
    before = copy.deepcopy(spec)
    plan = run(spec).plan
    turned = run({"weights": dict(reversed(weights.items())), "method": "mix"}).plan
    assert plan == turned
    assert hash(plan) == hash(turned)
    assert spec == before
    assert plan.weights[0][0] == "base"
    assert all(c != 0 for _, c in plan.weights[1:])
    assert list(plan.streams) == sorted(plan.streams)


@pytest.mark.parametrize(
    ("report", "expected"),
    [(None, "off"), (False, "off"), (True, "summary"), ("tokens", "tokens")],
)
def test_report(report: object, expected: str) -> None:
    spec = PROXY if report is None else {**PROXY, "report": report}
    assert run(spec).plan.report == expected


def test_own_prompts_are_completed_by_the_caller() -> None:
    spec = {**PROXY, "prompts": {"plain": {"token_ids": [1, 2]}, "chat": {"prompt": "Hi"}}}
    resolved = run(spec)
    assert resolved.plan.prompts == ()
    assert resolved.prompts["chat"].prompt == "Hi"
    plan = resolved.with_prompts({"plain": (1, 2), "chat": (7,)})
    assert plan.prompts == (("chat", (7,)), ("plain", (1, 2)))
    assert plan == resolved.with_prompts({"chat": (7,), "plain": (1, 2)})
    with pytest.raises(BadValue, match="no tokens") as caught:
        resolved.with_prompts({"plain": (1, 2), "chat": ()})
    assert caught.value.field == "steering.prompts.chat"


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "context_aware", "without": "twin", "strength": 0},
        {"method": "guidance", "negative": "twin", "strength": 1},
        {"method": "mix", "weights": {"base": 1, "twin": 0}},
    ],
)
def test_a_prompt_may_stay_when_its_stream_drops_out(spec: dict[str, Any]) -> None:
    resolved = run({**spec, "prompts": {"twin": {"prompt": "x"}}})
    assert not resolved.plan.steers
    assert not resolved.prompts


def test_a_profile_is_checked_under_its_own_name() -> None:
    good = Profile.model_validate({**PROXY, "limits": {"strength": [0, 1]}})

    def check(profile: Profile) -> Resolved:
        return check_profile("chat", profile, methods=METHODS, snapshot=SNAPSHOT, limits=Limits())

    assert check(good).plan.streams == ("chat", "plain")
    for change, field in (
        ({"strength": 1.5}, "profiles.chat.strength"),
        ({"expert": "nobody"}, "profiles.chat.expert"),
        ({"method": "magic"}, "profiles.chat.method"),
        ({"limits": {"strength": [0, 11]}}, "profiles.chat.limits.strength"),
        ({"typo": 1}, "profiles.chat.typo"),
    ):
        with pytest.raises((BadValue, NotFound)) as caught:
            check(Profile.model_validate({**good.spec, "limits": {"strength": [0, 1]}, **change}))
        assert caught.value.field == field


def test_what_is_0_in_float32_is_0() -> None:
    """The read-out's coefficients are float32: a plan that steers by less takes the base's path."""
    snapshot = Snapshot({"base": "lm", "chat": "lm", "value": "value"})
    tiny = 1e-60
    for spec in (
        {"method": "mix", "weights": {"base": 1.0, "chat": tiny}},
        {"method": "value_augmented", "values": [{"stream": "value", "strength": tiny}]},
    ):
        plan = resolve(spec, methods=discover(), snapshot=snapshot, limits=Limits()).plan
        assert (plan.steers, plan.streams) == (False, ())
    with pytest.raises(BadValue, match="all weights are 0"):
        resolve({"method": "mix", "weights": {"base": 0.0, "chat": tiny}}, methods=discover(),
                snapshot=snapshot, limits=Limits())  # fmt: skip
