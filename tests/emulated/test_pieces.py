"""Prompts in graphs, attention left out: steered engines, held against `transformers`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.emulated.platform import like_cuda
from tests.emulated.steered import check, engine_in, mix, step_of
from tests.engine.driver import Case, Engine
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

BUDGET = 32
"""Tokens of a step: prompts are read in parts, beside requests that decode."""

CASES = (
    Case(range(10, 30), mix(chat=1.5, plain=-1.0), max_tokens=6),
    Case(
        range(50, 90),
        mix(chat=1.0, twin=-0.5),
        {"chat": range(100, 117), "twin": range(60, 73)},
        max_tokens=5,
    ),
    Case(range(10, 13), max_tokens=6, arrives=1),
    Case(
        range(7, 52), mix(twin=0.7, plain=0.2), {"twin": range(200, 209)}, max_tokens=4, arrives=3
    ),
)
"""Own prompts, shorter than a part and than the others'; late ones beside rows that decode."""


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    streams = {"chat": ("qwen2", VOCAB_SIZE), "plain": ("qwen2", VOCAB_SIZE - 9), "twin": "base"}
    with like_cuda("NONE", (4, 8, 16, BUDGET)):
        found = engine_in(tmp_path_factory.mktemp("models"), streams, max_num_batched_tokens=BUDGET)
        yield found
        del found
        gc.collect()


def test_no_pass_is_without_graphs(steered: Engine) -> None:
    step = step_of(steered)
    check(steered, CASES, steered.run(CASES))
    assert all(step.counters.passes[name] > 5 for name in step.names)
    for i, name in enumerate(step.names):
        assert step.graphs.replays[i] == step.counters.passes[name]


def test_a_prompt_behind_a_prefix_that_is_there(steered: Engine) -> None:
    step = step_of(steered)
    for _ in range(2):
        [output] = steered.run([CASES[0]])
        check(steered, [CASES[0]], [output])
    assert output.num_cached_tokens >= 16
    assert step.graphs.replays[0] == step.counters.passes["base"]
