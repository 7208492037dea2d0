"""Conditional vectors and positions behind texts on V2: asynchronous steps, and drafts."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from steering.engine_args import Speculation, adapter_engine_args
from tests.emulated.platform import scheduling
from tests.engine.driver import BLOCK, STREAMS, Case, Engine, Use
from tests.engine.test_conditional import NAMES, make_all
from tests.engine.test_exactness import assert_exact, prompt
from tests.engine.test_phases import PROXY, text_in
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["asynchronous", "drafts"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    asynchronous = request.param == "asynchronous"
    more: dict[str, Any] = {} if asynchronous else {"speculation": Speculation("chat", 3)}
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6, "num_gpu_blocks_override": 24}
    folder = tmp_path_factory.mktemp("models")
    with scheduling(asynchronous=asynchronous):
        found = Engine(folder, ("qwen2", VOCAB_SIZE), STREAMS, vectors=True,
                       async_scheduling=asynchronous, **slots, **more)  # fmt: skip
        found.load_adapters(make_all(folder, found.folders["base"]))
        yield found
        del found
        gc.collect()


def test_mixed_batches(engine: Engine) -> None:
    rng, cases = random.Random(1), [Case(prompt(random.Random(0), 20, 20), PROXY)]
    for name in NAMES:
        for spec in (None, PROXY):
            cases.append(Case(prompt(rng, 3, 120), spec, {}, rng.randint(5, 9), rng.randrange(6),
                              adapters=(Use(name),)))  # fmt: skip
    assert_exact(engine, cases, engine.run(cases))


def test_behind_texts_and_from_the_nth(engine: Engine) -> None:
    """Drafts make the host's positions bounds: those of the device count."""
    rng, cases = random.Random(2), []
    for spec in (None, PROXY):
        ids = prompt(rng, 20, 110)
        text = text_in(engine, Case(ids, spec, max_tokens=8), 2)
        for where in ({"after": text}, {"until": text}, {"from": 3}, {"first": 4}, "reply"):
            use = Use("vector", where=json.dumps(where))
            cases.append(Case(ids, spec, {}, 10, rng.randrange(4), adapters=(use,)))
    assert_exact(engine, cases, engine.run(cases))


def test_preempted_requests(engine: Engine) -> None:
    rng, before = random.Random(3), engine.preemptions()
    cases = [
        Case(prompt(rng, 90, 120), None, {}, BLOCK, adapters=(Use(name),)) for name in NAMES * 2
    ]
    assert_exact(engine, cases, engine.run(cases))
    assert engine.preemptions() > before
