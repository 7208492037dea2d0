"""Phases on V2, whose newest tokens are on the device only: asynchronous steps, and drafts."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from steering.engine_args import Speculation
from steering.kernels.truncation import kept_reference
from steering.wire import TOP_N_SIGMA
from tests.emulated.platform import scheduling
from tests.engine.driver import STREAMS, Case, Engine, tokens
from tests.engine.heads import valued
from tests.engine.slow import assert_exact, steered
from tests.engine.test_exactness import prompt
from tests.engine.test_phases import MASKED, PROXY, assert_thought, phased, text_in, thinking
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["asynchronous", "drafts"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    asynchronous = request.param == "asynchronous"
    more: dict[str, Any] = {} if asynchronous else {"speculation": Speculation("chat", 3)}
    with scheduling(asynchronous=asynchronous):
        found = Engine(
            tmp_path_factory.mktemp("models"),
            ("llama", VOCAB_SIZE),
            STREAMS,
            lambda folder, _: {"value": valued(folder / "value", "qwen2", 21)},
            async_scheduling=asynchronous,
            num_gpu_blocks_override=2 * 28,  # half of them are for candidates
            reasoning_config={"reasoning_start_str": "[", "reasoning_end_str": "</think>"},
            **more,
        )
        yield found
        del found
        gc.collect()


def test_mixed_batches(engine: Engine) -> None:
    cases = phased(engine, 3)
    assert assert_exact(engine, cases, engine.run(cases)) > 12


def test_preempted_requests_are_in_the_phase_that_they_were_in(engine: Engine) -> None:
    rng = random.Random(1)
    cases = []
    for spec in (PROXY, MASKED, PROXY, PROXY):
        ids = prompt(rng, 90, 120)
        text = text_in(engine, Case(ids, spec, max_tokens=12), 4)
        for phases in ([{"after": text, "off": True}], [{"first": 6, "strength": 0.1}]):
            cases.append(Case(ids, {**spec, "phases": phases}, max_tokens=40))
    before = engine.preemptions()
    outputs = engine.run(cases)
    assert engine.preemptions() > before
    assert_exact(engine, cases, outputs)
    assert all(len(tokens(o)) == 40 for o in outputs)


def test_values_follow_phases_that_only_the_device_knows(engine: Engine) -> None:
    """Candidates are evaluated wherever a phase may hold; what is added is found there."""
    rng = random.Random(12)
    spec: dict[str, Any] = {"method": "value_augmented", "top_k": 5,
                            "values": [{"stream": "value", "strength": 2.0}]}  # fmt: skip
    other = {"values": [{"stream": "value", "strength": 0.7}], "top_k": 2}
    ids = prompt(rng, 20, 40)
    text = text_in(engine, Case(ids, spec, max_tokens=10), 2)
    cases = [Case(ids, {**spec, "phases": phases}, max_tokens=8, report="summary") for phases in (
        [{"after": text, "off": True}],
        [{"after": text, **other}, {"first": 1, "off": True}],
        [{"until": text, "off": True}],
        [{"from": 3, "off": True}],
    )]  # fmt: skip
    cases += [Case(prompt(rng, 9, 60), s, max_tokens=8, arrives=2) for s in (PROXY, spec, None)]
    outputs = engine.run(cases)
    assert assert_exact(engine, cases, outputs) >= 4
    passes = engine.report(engine.tags[3], outputs[3])["0"]["passes"]
    # Where an engine drafts, the host does not know for sure that a phase has begun.
    assert passes["base"] == 8 and 8 + 3 <= passes["value"] <= 8 + 8


def test_a_thinking_budget_ends_the_phase_of_thinking(engine: Engine) -> None:
    rng = random.Random(10)
    spec = {**PROXY, "phases": [{"after": "</think>", "off": True}]}
    asked = [(thinking(rng, spec, budget), budget) for budget in (4, 1)]
    for (case, budget), output in zip(asked, engine.run([c for c, _ in asked]), strict=True):
        assert_thought(engine, case, output, budget)


def test_top_n_sigma_is_of_the_steered_scores(engine: Engine) -> None:
    """Rows of drafts too, though the server refuses it there, as min-p."""
    rng = random.Random(11)
    cases = [
        Case(prompt(rng, 9, 40), spec, max_tokens=8, arrives=arrives,
             params={"temperature": 1.0, "seed": 3, "extra_args": {TOP_N_SIGMA: n} if n else {}})
        for spec, n, arrives in ((PROXY, 0.5, 0), (None, 1.0, 2), (PROXY, 0.0, 1), (MASKED, 1.5, 3))
    ]  # fmt: skip
    narrow = 0
    for case, output in zip(cases, engine.run(cases), strict=True):
        n = case.params["extra_args"].get(TOP_N_SIGMA, 0.0)
        for at, token in enumerate(drawn := tokens(output)):
            kept = kept_reference(steered(engine, case, drawn[:at]), n or 1e6)
            assert kept[token], (case, at)
            narrow += bool(n) and kept.sum() < 100
    assert narrow > 10
