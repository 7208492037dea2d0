"""Graphs of streams with adapters, packs, taps, candidates and reports; asynchronous."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from vllm.config import CompilationMode

from steering.engine_args import StreamSource, adapter_engine_args
from tests.adapters.make import make_lora, make_native
from tests.adapters.vectors import make_reft, make_vector
from tests.emulated.platform import like_cuda
from tests.emulated.steered import check, engine_in, mix, step_of
from tests.engine.driver import Case, Engine, Use, logprobs, tokens
from tests.engine.heads import valued
from tests.engine.test_vectors import hidden
from tests.models import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

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

PLACED = (
    Case(range(20, 29), adapters=(Use("vector"),), max_tokens=8),
    Case(range(40, 46), adapters=(Use("reft", where='"prompt"'), Use("one", 0.5)), max_tokens=7),
    Case(range(60, 69), mix(twin=-0.5), {"twin": range(5, 15)}, 8,
         adapters=(Use("vector", where='{"from": 2}'), Use("reft", 0.7, "twin"))),
    Case(range(30, 38), max_tokens=6, arrives=1),
    Case(range(50, 57), adapters=(Use("pack", where='{"first": 3}'), Use("vector", -1.0)),
         max_tokens=8, arrives=2),
    Case(range(70, 79), adapters=(Use("reft", where='{"from": 1, "first": 4}'),), arrives=3,
         max_tokens=8),
)  # fmt: skip
"""Vectors, and adapters of some positions: what acts changes while the graphs go on."""

TAPS = {
    "embedded": StreamSource(on="base", layer=0, norm=False),
    "early": StreamSource(on="base", layer=1, norm=True),
    "chat-early": StreamSource(on="chat", layer=2, norm=True),
    "twin-early": StreamSource(on="twin", layer=1, norm=True),
}

DOLA: dict[str, Any] = {"method": "dola", "layers": ["embedded", "early"]}

TAPPED = (
    Case(range(20, 29), DOLA, max_tokens=7),
    Case(range(40, 46), {"method": "contrastive", "amateur": "early", "strength": 0.4},
         max_tokens=6, adapters=(Use("vector", 0.5),)),
    Case(range(60, 69), {"method": "sled", "layers": ["early"], "top_k": 7}, max_tokens=6),
    Case(range(30, 38), max_tokens=5, arrives=1),
    Case(range(50, 57), mix(early=-0.3, **{"chat-early": 0.4}), max_tokens=7, arrives=2),
    Case(range(70, 79), mix(**{"twin-early": 0.6}), {"twin": range(5, 15)}, arrives=3,
         max_tokens=6, adapters=(Use("reft", 0.7, "twin"),)),
    Case(range(80, 86), {**DOLA, "jsd": True}, max_tokens=6, arrives=3, adapters=(Use("one"),)),
)  # fmt: skip
"""Taps of base, companion and twin, with what adapters add in front of them, and a plain row."""

VALUED = {"method": "value_augmented", "values": [{"stream": "value", "strength": 2.0}], "top_k": 4}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("adapted")
    with like_cuda("NONE", (4, 48), asynchronous=True, compiled=True):
        found = engine_in(
            folder,
            {"chat": ("qwen2", VOCAB_SIZE), "twin": "base"},
            heads=lambda folder, _: {"value": valued(folder / "value", "qwen2", 21)},
            async_scheduling=True,
            vectors=True,
            taps=TAPS,
            **adapter_engine_args(3, 24),
        )
        base, chat = found.folders["base"], found.folders["chat"]
        lora, pack = (
            make_lora(folder / "one", base, seed=1),
            make_native(folder / "pack", base, tasks=3, seed=10),
        )
        width, layers = hidden(base)
        vector = make_vector(folder / "vector", width, range(layers), seed=5)
        reft = make_reft(folder / "reft", width, range(layers), seed=6)
        found.load_adapters({"one": lora, "pack": pack, "vector": vector, "reft": reft})
        found.load_adapters({"chat": make_lora(folder / "lora-chat", chat, seed=3)}, "chat")
        yield found
        del found
        gc.collect()


def test_adapters_are_right_in_graphs(adapted: Engine) -> None:
    assert adapted.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    step = step_of(adapted)
    check(adapted, ADAPTED, adapted.run(ADAPTED))
    for i, name in enumerate(step.names[:3]):  # prompts too
        assert step.graphs.replays[i] == step.counters.passes[name] > 5


def test_models_with_adapters_are_compiled(adapted: Engine) -> None:
    """Each once, but for the twin; all that is launched is attention and what is traced."""
    compilation = adapted.llm.llm_engine.vllm_config.compilation_config
    assert compilation.mode == CompilationMode.VLLM_COMPILE
    step = step_of(adapted)
    models = {id(model): model.model for model in step.models}
    assert len(models) == 3
    assert all(model.compiled for model in models.values())


def test_vectors_and_positions_are_right_in_graphs(adapted: Engine) -> None:
    step = step_of(adapted)
    before = step.graphs.replays[0]
    check(adapted, PLACED, adapted.run(PLACED))
    assert step.graphs.replays[0] - before >= 5


def test_taps_are_right_in_graphs(adapted: Engine) -> None:
    """What they read is written inside the graphs, and must stand where the read-out looks."""
    step = step_of(adapted)
    before = [step.graphs.replays[i] for i in range(3)]
    check(adapted, TAPPED, adapted.run(TAPPED))
    assert all(step.graphs.replays[i] - was >= 4 for i, was in enumerate(before))


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
    step = step_of(adapted)
    reports: list[dict[str, Any]] = []
    before = step.graphs.replays[0]
    for context in (nullcontext(), launched(step)):
        with context:
            [output] = adapted.run([case], salt=str(len(reports)))
            reports.append(adapted.report(adapted.tags[0], output)["0"])
    assert step.graphs.replays[0] - before == 4
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
