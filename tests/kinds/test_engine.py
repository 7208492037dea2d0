"""Kinds that are served: every adapter that PEFT wrote, inside the engine, as PEFT computes it."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from steering.engine_args import adapter_engine_args
from tests.adapters.kinds import BASES, SERVED, Case, make
from tests.engine import driver
from tests.engine.driver import Engine, Use, logprobs, tokens
from tests.engine.test_exactness import prompt
from tests.kinds.table import TOLERANCE, Row
from tests.models import ARCHITECTURES, VOCAB_SIZE

pytestmark = pytest.mark.engine

COMPANIONS = tuple(dict.fromkeys(case.base for case in SERVED if case.base != "llama"))
NAMES = {case.name: f"adapter{i}" for i, case in enumerate(SERVED)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base and a companion of every other architecture, with all the adapters."""
    folder = tmp_path_factory.mktemp("models")
    slots = {**adapter_engine_args(4, 16), "max_cpu_loras": 8}
    with patch.dict(ARCHITECTURES, BASES):
        found = Engine(
            folder, ("llama", VOCAB_SIZE), {n: (n, VOCAB_SIZE) for n in COMPANIONS}, **slots
        )
    for case in SERVED:
        stream = "base" if case.base == "llama" else case.base
        made = make(case, folder / NAMES[case.name], found.folders[stream], seed=3)
        found.load_adapters({NAMES[case.name]: made}, stream)
    yield found
    del found
    gc.collect()


def requests(case: Case, rng: random.Random) -> list[driver.Case]:
    """Two requests that use an adapter, on its own stream."""
    stream = "base" if case.base == "llama" else case.base
    spec = {"method": "mix", "weights": {"base": 0.3, stream: 0.7}}
    use = Use(NAMES[case.name], stream=stream)
    return [
        driver.Case(prompt(rng, 3, 80), None if stream == "base" else spec, {}, 5,
                    rng.randrange(6), adapters=(use,))
        for _ in range(2)
    ]  # fmt: skip


def test_all_of_them_in_one_batch(
    engine: Engine, row: Callable[[Case], Row], tmp_path: Path
) -> None:
    rng = random.Random(1)
    tried = [(case, own) for case in SERVED for own in requests(case, rng)]
    outputs = engine.run([own for _, own in tried])
    for case in (case for case in SERVED if case.change):  # PEFT reads no shards
        whole = make(replace(case, change=None), tmp_path, engine.folders["base"], seed=3)
        engine.load_adapters({NAMES[case.name]: whole})
    errors: dict[str, float] = {}
    for (case, own), output in zip(tried, outputs, strict=True):
        steps = engine.reference(own)
        assert tokens(output) == [step.token for step in steps], case.name
        pairs = zip(logprobs(output), steps, strict=True)
        error = max(abs(got - step.logprob) for got, step in pairs)
        assert error < TOLERANCE, case.name
        errors[case.name] = max(error, errors.get(case.name, 0.0))
    for case in SERVED:
        row(case).served(case, errors[case.name])
