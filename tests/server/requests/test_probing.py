"""What is tried at start: all streams in one sum, all heads read."""

from __future__ import annotations

from typing import Any

import pytest

from server.requests import probing
from steering.bans import BANNED, with_bans
from steering.engine_args import StreamSource, steered_engine_args
from steering.errors import DoesNotFit
from steering.plan import Rule, RuleKind, SteeringPlan


def test_every_stream_and_head_is_tried() -> None:
    plan = probing.plan(
        {
            "twin": {"same_as": "base"},
            "chat": {"model": "chat"},
            "value": {"model": "value", "head": "value"},
            "probe": {"on": "chat", "head": "classifier", "path": "p"},
            "critic": {"on": "base", "head": "classifier", "path": "c"},
        }
    )
    assert dict(plan.weights) == {"base": 1.0, "chat": 1.0, "twin": 1.0}
    assert plan.heads == ("critic", "probe", "value")
    assert plan.bodies == ("value",)
    assert set(plan.streams) == {"chat", "twin", "value"}


@pytest.mark.parametrize("size", [16, 500, 151_936])
def test_the_prompt_is_of_tokens(size: int) -> None:
    ids = probing.prompt(size)
    assert len(set(ids)) == probing.TOKENS
    assert 0 <= min(ids) <= max(ids) < size / 2


def test_a_bias_bans_only_where_a_rule_sets_back() -> None:
    weights = (("base", 1.5), ("plain", -0.5))
    bias = {3: -100.0, 4: -99.0, 5: 100.0}
    ruled = SteeringPlan("m", weights, Rule(RuleKind.PLAUSIBLE, "base", 0.1))
    assert with_bans(bias, ruled) == {3: BANNED, 4: -99.0, 5: 100.0}
    assert with_bans(bias, SteeringPlan("m", weights)) == bias
    assert with_bans(None, ruled) is None


def test_the_backend_of_grammars_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.models import make_model

    base = str(make_model(tmp_path_factory.mktemp("m") / "base", "llama", seed=1))
    streams = {"twin": StreamSource(same_as="base")}

    def asked(**engine: Any) -> Any:
        return steered_engine_args(base, streams, **engine)["structured_outputs_config"]

    assert asked() == {"backend": "xgrammar"}
    config = {"disable_any_whitespace": True}
    assert asked(structured_outputs_config=config) == {"backend": "xgrammar", **config}
    other = {"backend": "guidance"}
    assert asked(structured_outputs_config=other) == other
    with pytest.raises(DoesNotFit, match=r"engine\.structured_outputs_config: refused"):
        asked(structured_outputs_config={"backend": "auto"})
