"""Plain vLLM: V2 in the interpreter says what V1 says; with graphs too."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulated.graphs import CUDAGraph
from tests.emulated.plain import PARAMS, Answers, answers, engine, ordinary, runner
from tests.emulated.platform import like_cuda
from tests.models import make_model

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

TOLERANCE = 1e-4
"""Nats, float32."""

GRAPHS = {name: PARAMS[name] for name in ("short", "short penalties")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain"), "llama")


@pytest.fixture(scope="module")
def both(model: Path) -> tuple[Answers, Answers]:
    """V1's answers and V2's."""
    first = ordinary(model)
    llm = engine(model)
    assert type(runner(llm)).__mro__[1].__module__ == "vllm.v1.worker.gpu.model_runner"
    second = answers(llm)
    del llm
    gc.collect()
    printed, _ = first.communicate(timeout=250)
    found = json.loads(printed.splitlines()[-1])
    assert found.pop("runner") == "vllm.v1.worker.gpu_model_runner"
    return found, second


@pytest.fixture(scope="module")
def captured(model: Path, both: tuple[Answers, Answers]) -> Iterator[Any]:
    """An engine with graphs of 2 and of 4 rows, so that 3 are padded; the other one has ended."""
    with like_cuda("FULL_DECODE_ONLY", sizes=(2, 4)):
        llm = engine(model, enforce_eager=False, block_size=16)
        yield llm
        del llm
        gc.collect()


def compare(got: Answers, want: Answers, name: str) -> None:
    """Equal tokens, log-probabilities within the tolerance."""
    for mine, theirs in zip(got[name], want[name], strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for key in ("logprobs", "prompt"):
            for here, there in zip(mine[key], theirs[key], strict=True):
                assert here == pytest.approx(there, abs=TOLERANCE)


@pytest.mark.parametrize("name", PARAMS)
def test_v2_says_what_v1_says(both: tuple[Answers, Answers], name: str) -> None:
    first, second = both
    compare(second, first, name)


def test_the_cases_are_what_they_are_called(both: tuple[Answers, Answers]) -> None:
    _, found = both
    tokens = {name: [answer["tokens"] for answer in found[name]] for name in PARAMS}
    assert all(tokens[name] != tokens["greedy"] for name in ("penalties", "bias", "regex"))
    assert tokens["top k 1"] == tokens["greedy"]
    assert {len(ids) for ids in tokens["min tokens"]} == {5}
    assert [len(answer["prompt"]) for answer in found["prompt logprobs"]] == [7, 40, 130]


def test_graphs_say_what_eager_mode_says(captured: Any, both: tuple[Answers, Answers]) -> None:
    graphs = runner(captured).cudagraph_manager.graphs
    assert len(graphs) == 2
    assert all(isinstance(graph, CUDAGraph) for graph in graphs.values())
    before = sum(graph.replays for graph in graphs.values())
    found = answers(captured, GRAPHS)
    assert sum(graph.replays for graph in graphs.values()) - before >= 2 * 6
    for name in GRAPHS:
        compare(found, both[1], name)
