"""The kit itself: it fails for methods that break the contract, and cannot be hollowed out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from steering.method import Logits, Snapshot
from steering.methods.proxy_tuning import ProxyTuning, ProxyTuningConfig
from steering.plan import Recipe
from steering.testing import MethodConformance

SPEC = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}


def kit(method: ProxyTuning | None = None, **members: Any) -> MethodConformance:
    fixtures: dict[str, Any] = {
        "method": method or ProxyTuning(),
        "configs": (SPEC,),
        "zero_config": {**SPEC, "strength": 0},
        "bad_configs": (),
    }
    subclass: type[MethodConformance] = type("Kit", (MethodConformance,), {**fixtures, **members})
    return subclass()


@pytest.mark.parametrize("member", [None, lambda self: None, 3])
def test_a_test_cannot_be_removed_or_overridden(member: object) -> None:
    with pytest.raises(TypeError, match="removes or overrides test_resolve_is_pure"):
        kit(test_resolve_is_pure=member)


def test_an_inherited_override_is_found_too() -> None:
    class Mixin:
        def test_resolve_is_pure(self) -> None:
            pass

    with pytest.raises(TypeError, match="test_resolve_is_pure"):
        type("Kit", (Mixin, MethodConformance), vars(type(kit())) | {})


def test_an_expected_failure_needs_a_reason() -> None:
    @pytest.mark.xfail
    def unexplained(self: object) -> None:
        pass

    @pytest.mark.xfail(reason="waits for version 0.2 of the model's format")
    def explained(self: object) -> None:
        pass

    with pytest.raises(TypeError, match="reason"):
        kit(test_resolve_is_pure=unexplained)
    kit(test_resolve_is_pure=explained)


@pytest.mark.parametrize("fixture", ["method", "configs", "zero_config", "bad_configs"])
def test_every_fixture_is_needed(fixture: str) -> None:
    members = {n: 1 for n in ("method", "configs", "zero_config", "bad_configs") if n != fixture}
    with pytest.raises(TypeError, match=f"must give {fixture}"):
        type("Kit", (MethodConformance,), members)
    with pytest.raises(TypeError, match="at least one"):
        kit(configs=())


class Leaky(ProxyTuning):
    """Keeps state between calls."""

    calls = 0

    def resolve(self, config: ProxyTuningConfig, snapshot: Snapshot) -> Recipe:
        """Drifts."""
        self.calls += 1
        return Recipe({"base": 1.0, config.expert: float(self.calls)})


class AlmostBase(ProxyTuning):
    """Does not take the base's own path at strength 0."""

    def resolve(self, config: ProxyTuningConfig, _snapshot: Snapshot) -> Recipe:
        """Zero weights instead of none."""
        a = config.strength
        return Recipe({"base": 1.0, config.expert: a, config.anti_expert: -a})


class Crooked(ProxyTuning):
    """Its reference has the sign of one term wrong."""

    def reference(self, config: ProxyTuningConfig, logits: Mapping[str, Logits]) -> Logits:
        """Adds the anti-expert."""
        a = config.strength
        return logits["base"] + a * (logits[config.expert] + logits[config.anti_expert])


@pytest.mark.parametrize(
    ("method", "test"),
    [
        (Leaky(), "test_resolve_is_pure"),
        (AlmostBase(), "test_zero_strength_is_exactly_the_base"),
        (Crooked(), "test_recipe_matches_the_reference"),
    ],
)
def test_the_kit_catches_a_broken_method(method: ProxyTuning, test: str) -> None:
    with pytest.raises(AssertionError):
        getattr(kit(method), test)()


def test_the_kit_catches_a_field_that_is_not_named() -> None:
    wrong = kit(bad_configs=(({**SPEC, "strength": -1}, "expert"),))
    with pytest.raises(AssertionError):
        wrong.test_bad_configs_name_their_field()
    accepted = kit(bad_configs=((SPEC, "expert"),))
    with pytest.raises(pytest.fail.Exception):
        accepted.test_bad_configs_name_their_field()
