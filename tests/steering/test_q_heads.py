"""Q heads: values of all next tokens at once, as a term of the sum."""

from __future__ import annotations

from typing import Any

import pytest

from steering.errors import BadValue
from steering.method import Limits, Snapshot
from steering.methods.critical_tokens import CriticalTokens
from steering.methods.mix import Mix
from steering.methods.value_augmented import ValueAugmented
from steering.plan import SteeringPlan
from steering.resolve import resolve

STREAMS = Snapshot({"base": "lm", "chat": "lm", "q": "q", "kind": "q", "value": "value",
                    "critic": "classifier"})  # fmt: skip
METHODS = {m.name: m for m in (ValueAugmented(), Mix(), CriticalTokens())}


def plan(**spec: Any) -> SteeringPlan:
    return resolve(spec, methods=METHODS, snapshot=STREAMS, limits=Limits()).plan


def augmented(**strengths: float) -> SteeringPlan:
    values = [{"stream": name, "strength": b} for name, b in strengths.items()]
    return plan(method="value_augmented", values=values, top_k=5)


def test_q_heads_are_terms_of_the_sum() -> None:
    """`mix` is tested against transformers; this is the same plan but for its name."""
    found = augmented(q=2.0, kind=0.5)
    assert found.weights == plan(method="mix", weights={"base": 1, "q": 2, "kind": 0.5}).weights
    assert found.values is None and not found.bodies


def test_beside_a_value_head_each_has_its_own_way() -> None:
    found = augmented(q=2.0, value=3.0)
    assert found.weights == (("base", 1.0), ("q", 2.0))
    assert found.values is not None and found.values.strengths == (("value", 3.0),)
    assert found.streams == ("q", "value")


def test_strength_zero_is_the_base() -> None:
    assert not augmented(q=0.0).steers


def test_a_q_head_is_no_language_model() -> None:
    with pytest.raises(BadValue, match="q head"):
        plan(method="critical_tokens", pretrained="q", classifier="critic")


@pytest.mark.parametrize("stream", ["base", "chat", "critic"])
def test_other_streams_have_no_value(stream: str) -> None:
    with pytest.raises(BadValue, match="no value head"):
        augmented(**{stream: 1.0})
