"""The arithmetic of guided search, and the plans of its rounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from steering.errors import BadValue, NotFound
from steering.method import Limits, Snapshot
from steering.plan import BASE, SteeringPlan
from steering.plugins import discover
from steering.resolve import resolve
from steering.search import Score, chosen, scaled

SNAPSHOT = Snapshot(
    {"base": "lm", "small": "lm", "tuned": "lm", "value": "value", "probe": "classifier"},
    {"probe": "small"},
)
SPEC: dict[str, Any] = {"method": "guided_search", "score": {"value": "value"}}


def plan(**changes: Any) -> SteeringPlan:
    spec = {**SPEC, **changes}
    found = resolve(spec, methods=discover(), snapshot=SNAPSHOT, limits=Limits(best_of=8))
    prompts = dict.fromkeys(found.prompts, (7, 8))
    return found.with_prompts(prompts)


@pytest.mark.parametrize("x", [-800.0, -2.5, 0.0, 3.0, 800.0])
def test_scales_of_a_head(x: float) -> None:
    want = 1 / (1 + math.exp(-max(x, -700)))
    assert scaled(x, "raw") == x
    assert scaled(x, "probability") == pytest.approx(want, abs=1e-12)
    assert scaled(x, "log_probability") == pytest.approx(-np.logaddexp(0, -x))


def test_what_is_not_finite_loses() -> None:
    for number, ratio in ((math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, math.inf)):
        assert Score("value").total(number, ratio) == -math.inf
    assert Score("value", 2.0).total(1.5, -0.5) == 2.5
    assert chosen([-math.inf, 1.0, 1.0], 2, None) == [1, 2]
    assert chosen([-math.inf] * 2, 1, None) == [0]


def test_soft_choices_have_their_probabilities() -> None:
    scores, beta = [0.3, -0.7, 1.1], 1.5
    rng = np.random.default_rng(3)
    counts = np.zeros(3)
    draws = 20_000
    for u in rng.random((draws, 3)):
        counts[chosen(scores, 1, beta, [*u])[0]] += 1
    weights = np.exp(beta * np.array(scores))
    assert counts / draws == pytest.approx(weights / weights.sum(), abs=0.015)


def test_a_small_stream_draws_without_the_base() -> None:
    found = plan(draw="small", k=1, accept={"at_least": 0.5})
    assert found.search is not None and found.search.fallback is not None
    drawing, again = (found.proposing(p) for p in found.search.proposals)
    assert drawing.weights == (("small", 1.0),) and not drawing.runs_base
    assert (drawing.report, drawing.search) == ("off", None)
    assert again.weights == ((BASE, 1.0),) and not again.steers
    assert again.cache_key(0) == ""
    assert drawing.cache_key(0) != plan(draw={"base": 1, "small": 1}).cache_key(0)
    assert set(found.streams) == {"small", "value"} and found.steers
    told = plan(draw="small", report="tokens")
    assert told.search is not None and told.proposing(told.search.draw).bodies == (BASE,)


def test_a_log_ratio_is_read_where_the_tokens_are_drawn() -> None:
    found = plan(score={"log_ratio": {"of": "tuned", "to": "small"}}, beams=2)
    assert found.search is not None
    drawing = found.proposing(found.search.draw)
    assert drawing.likelihoods == ("tuned", "small") == drawing.streams
    assert drawing.report == "summary" and drawing.weights == ((BASE, 1.0),)
    base = plan(draw="small", score={"log_ratio": {"of": "base", "to": "small"}})
    assert base.search is not None and base.proposing(base.search.draw).runs_base


def test_prompts_go_with_the_streams_of_a_round() -> None:
    found = plan(score={"value": "probe"}, prompts={"small": {"prompt": "a"}})
    assert found.search is not None
    assert found.proposing(found.search.draw).prompts == ()
    score = found.search.draw.score
    assert score is not None and score.body == "small"
    reading = found.reading(score.head, score.body)
    assert reading.prompts == (("small", (7, 8)),) and reading.heads == ("probe",)


def test_a_stream_that_is_not_there_is_named_as_it_was_written() -> None:
    for draw, field in (("nobody", "steering.draw"), ({"nobody": 1.0}, "steering.draw.nobody")):
        with pytest.raises(NotFound, match="got 'nobody'") as caught:
            plan(draw=draw)
        assert caught.value.field == field


def test_the_server_s_limit_holds_for_what_is_drawn_at_a_time() -> None:
    assert plan(k=4, beams=2).search is not None
    with pytest.raises(BadValue, match=r"steering.beams: .*\(got 9\); allowed: 1 to 8"):
        plan(k=3, beams=3)
