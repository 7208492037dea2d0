"""One graph per stream: decoding of steered engines is replayed, held against `transformers`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from steering.engine_args import adapter_engine_args
from tests.adapters.make import make_lora, make_native
from tests.emulated.platform import like_cuda
from tests.engine.driver import Case, Engine, Use, logprobs, tokens
from tests.engine.heads import valued
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
"""Nats, float32."""


def mix(**weights: float) -> dict[str, Any]:
    return {"method": "mix", "weights": {"base": 1.0, **weights}}


def engine_in(folder: Path, streams: Any, **more: Any) -> Engine:
    small: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 8 << 20,
    }
    base = ("llama", VOCAB_SIZE)
    return Engine(folder, base, streams, enforce_eager=False, block_size=16, **small, **more)


def step_of(engine: Engine) -> Any:
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    return worker.model_runner.get_model()._step


def check(engine: Engine, cases: Sequence[Case], outputs: Sequence[Any]) -> None:
    for output, case in zip(outputs, cases, strict=True):
        want = engine.reference(case)
        assert tokens(output) == [step.token for step in want]
        assert logprobs(output) == pytest.approx([s.logprob for s in want], abs=TOLERANCE)


# --- streams ------------------------------------------------------------------------------------

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
    check(steered, CASES, steered.run(CASES))
    passes = [step.counters.passes[name] for name in step.names]
    # Prompts are launched piece by piece: two steps of the first rows', one of the late one.
    eager = [passes[i] - step.graphs.replays[i] for i in range(len(passes))]
    assert all(0 < count <= 4 for count in eager)
    assert all(step.graphs.replays[i] > 5 for i in range(len(passes)))


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


# --- adapters, values, asynchronous scheduling --------------------------------------------------

ADAPTED = (
    Case(range(10, 18), adapters=(Use("one"),), max_tokens=6),
    Case(
        range(10, 19),
        mix(chat=1.2),
        adapters=(Use("pack", top_k=2), Use("chat", stream="chat")),
        max_tokens=7,
    ),
    Case(
        range(50, 66),
        mix(chat=1.0, twin=-0.5),
        {"twin": range(60, 67)},
        adapters=(Use("one", 0.7, stream="twin"), Use("pack", -0.5)),
        max_tokens=6,
    ),
    Case(range(30, 38), max_tokens=6, arrives=1),
    Case(range(7, 15), mix(twin=0.7), {"twin": range(200, 207)}, max_tokens=4, arrives=3),
)
"""A twin's adapter beside its original's; the last two have none and follow those that had."""

VALUED = {"method": "value_augmented", "values": [{"stream": "value", "strength": 2.0}], "top_k": 4}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("adapted")
    with like_cuda("NONE", (1, 4), asynchronous=True):
        found = engine_in(
            folder,
            {"chat": ("qwen2", VOCAB_SIZE), "twin": "base"},
            heads=lambda folder, _: {"value": valued(folder / "value", "qwen2", 21)},
            async_scheduling=True,
            **adapter_engine_args(3, 24),
        )
        base, chat = found.folders["base"], found.folders["chat"]
        lora, pack = (
            make_lora(folder / "one", base, seed=1),
            make_native(folder / "pack", base, tasks=3, seed=10),
        )
        found.load_adapters({"one": lora, "pack": pack})
        found.load_adapters({"chat": make_lora(folder / "lora-chat", chat, seed=3)}, "chat")
        yield found
        del found
        gc.collect()


def test_adapters_are_right_in_graphs(adapted: Engine) -> None:
    assert adapted.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    step = step_of(adapted)
    check(adapted, ADAPTED, adapted.run(ADAPTED))
    assert all(step.graphs.replays[i] >= 5 for i in range(3))


@contextmanager
def launched(step: Any) -> Iterator[None]:
    """Without graphs."""
    graphs, step.graphs = step.graphs, None
    try:
        yield
    finally:
        step.graphs = graphs


def test_routes_are_counted_in_graphs(adapted: Engine) -> None:
    uses = (Use("pack", top_k=2), Use("pack", 0.5, stream="twin", top_k=1))
    case = Case(range(40, 48), mix(twin=0.7), adapters=uses, max_tokens=4, report="summary")
    step, reports = step_of(adapted), []
    before = step.graphs.replays[0]
    for context in (nullcontext(), launched(step)):
        with context:
            [output] = adapted.run([case], salt=str(len(reports)))
            reports.append(adapted.report(adapted.tags[0], output)["0"])
    assert step.graphs.replays[0] - before == 3
    assert reports[0]["routed"] == reports[1]["routed"] != {}
    assert reports[0]["passes"] == reports[1]["passes"]


def test_candidates_in_graphs_are_as_launched_piece_by_piece(adapted: Engine) -> None:
    step = step_of(adapted)
    value, graphs = step.names.index("value"), step.graphs
    cases = [Case(range(20, 29), VALUED, max_tokens=4), Case(range(20, 31), max_tokens=4)]
    before = graphs.replays[value]
    got = adapted.run(cases, salt="replayed")
    # In each step the value stream runs twice: behind its prefix, and the candidates.
    assert graphs.replays[value] - before >= 7
    with launched(step):
        want = adapted.run(cases, salt="launched")
    for mine, theirs in zip(got, want, strict=True):
        assert tokens(mine) == tokens(theirs)
        assert logprobs(mine) == pytest.approx(logprobs(theirs), abs=1e-5)
