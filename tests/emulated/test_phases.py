"""Phases on V2, whose newest tokens are on the device only: asynchronous steps, and drafts."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from steering.engine_args import Speculation
from tests.emulated.platform import scheduling
from tests.engine.driver import STREAMS, Case, Engine, tokens
from tests.engine.slow import assert_exact
from tests.engine.test_exactness import prompt
from tests.engine.test_phases import MASKED, PROXY, phased, text_in
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
            async_scheduling=asynchronous,
            num_gpu_blocks_override=28,
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
