"""One graph per stream: decoding of steered engines is replayed, held against `transformers`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.emulated.platform import like_cuda
from tests.engine.driver import Case, Engine, logprobs, tokens

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
"""Nats, float32."""

STREAMS = {"chat": ("qwen2", 500), "plain": ("qwen2", 490), "twin": "base"}


def mix(**weights: float) -> dict[str, Any]:
    return {"method": "mix", "weights": {"base": 1.0, **weights}}


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


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with like_cuda("NONE", asynchronous=request.param):
        found = Engine(
            tmp_path_factory.mktemp("models"),
            ("llama", 500),
            STREAMS,
            enforce_eager=False,
            max_num_seqs=4,
            max_model_len=128,
            block_size=16,
            kv_cache_memory_bytes=8 << 20,
            async_scheduling=request.param,
        )
        yield found
        del found
        gc.collect()


def model_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def check(engine: Engine, cases: Sequence[Case]) -> None:
    for output, case in zip(engine.run(cases), cases, strict=True):
        want = engine.reference(case)
        assert tokens(output) == [step.token for step in want]
        assert logprobs(output) == pytest.approx([s.logprob for s in want], abs=TOLERANCE)


def test_every_stream_is_replayed_in_mixed_batches(engine: Engine) -> None:
    graphs = model_of(engine)._step.graphs
    before = dict(graphs.replays)
    check(engine, CASES)
    assert all(graphs.replays[i] > before[i] + 5 for i in range(4))
