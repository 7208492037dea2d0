"""One graph per stream: decoding of steered engines is replayed, held against `transformers`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from tests.emulated.platform import like_cuda
from tests.emulated.steered import check, engine_in, mix, step_of
from tests.engine.driver import Case, Engine
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

CASES = (
    Case(range(10, 30), mix(chat=1.5, plain=-1.0), max_tokens=9),
    Case(range(10, 40), max_tokens=8),
    Case(
        range(50, 90),
        mix(chat=1.0, twin=-0.5),
        {"chat": range(100, 117), "twin": range(60, 73)},
        max_tokens=10,
    ),
    Case(range(7, 20), mix(twin=0.7), {"twin": range(200, 221)}, max_tokens=6, arrives=2),
)
"""A plain row, own prompts, a late one; every stream is used by some rows only."""


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    streams = {"chat": ("qwen2", VOCAB_SIZE), "plain": ("qwen2", VOCAB_SIZE - 9), "twin": "base"}
    with like_cuda("NONE"):
        found = engine_in(tmp_path_factory.mktemp("models"), streams)
        yield found
        del found
        gc.collect()


def test_every_stream_is_replayed_in_mixed_batches(steered: Engine) -> None:
    step = step_of(steered)

    def counted() -> tuple[np.ndarray, np.ndarray]:
        """Of each stream: passes, and those that were replayed."""
        passes = [step.counters.passes[name] for name in step.names]
        return np.array(passes), np.array([step.graphs.replays[i] for i in range(len(passes))])

    passes, replays = counted()
    check(steered, CASES, steered.run(CASES))
    passes, replays = (after - was for after, was in zip(counted(), (passes, replays), strict=True))
    # Prompts are launched piece by piece: two steps of the first rows', one of the late one.
    eager = passes - replays
    assert np.all((eager > 0) & (eager <= 4)) and np.all(replays > 5)


def test_prefix_hits_and_plain_steps(steered: Engine) -> None:
    """All rows plain: the base's own pass is replayed too."""
    step, cases = step_of(steered), [Case(range(10, 40), max_tokens=4), CASES[0]]
    for _ in range(2):
        for case in cases:
            before = step.graphs.replays[0]
            [output] = steered.run([case])
            check(steered, [case], [output])
            assert step.graphs.replays[0] - before >= case.max_tokens - 1
    assert output.num_cached_tokens >= 16


def test_backends_prepare_for_replays(steered: Engine) -> None:
    """Others keep in memory that nobody holds what a graph would go on reading."""
    step = step_of(steered)
    for i in range(len(step.names)):
        for group in step.graphs._streams[i].groups:
            builder = group.layers.attention.get_metadata_builder()
            assert builder.decode_cudagraph_enabled
    for groups in step.contexts._groups:
        for group in groups:
            assert not group.attention.get_metadata_builder().decode_cudagraph_enabled
