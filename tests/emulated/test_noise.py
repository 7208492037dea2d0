"""Graphs of the whole steered model answer noise: vLLM records them before the streams are bound.

So the arguments refuse such a configuration, binding refuses it again, and here both are made to
let it pass, so that the tests show what they prevent.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steering import refused
from steering.engine_args import StreamSource, steered_engine_args
from steering.errors import DoesNotFit
from steering.worker.runners import v2
from tests.emulated.plain import runner
from tests.emulated.platform import like_cuda
from tests.engine.driver import Case, Engine, logprobs, tokens
from tests.models import VOCAB_SIZE, make_model

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

MODE = "FULL_DECODE_ONLY"
SMALL: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_model_len": 128,
    "block_size": 16,
    "kv_cache_memory_bytes": 8 << 20,
    "enforce_eager": False,
}
MIX = {"method": "mix", "weights": {"base": 1.0, "chat": 1.5}}
CASES = [Case(range(10, 22), MIX, max_tokens=5), Case(range(10, 24), max_tokens=5)]


def old(folder: Path) -> Engine:
    """An engine with graphs of its outer model."""
    streams: dict[str, tuple[str, int] | str] = {"chat": ("qwen2", VOCAB_SIZE)}
    return Engine(folder, ("llama", VOCAB_SIZE), streams, **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noise")


@pytest.fixture(scope="module")
def captured(folder: Path) -> Iterator[Engine]:
    """The old configuration, let through."""
    with like_cuda(MODE, sizes=(2,)), pytest.MonkeyPatch.context() as patched:
        patched.setattr(v2, "refused_config", lambda _: [])
        engine = old(folder)
        yield engine
        del engine
        gc.collect()


def test_the_arguments_refuse_graphs_of_the_outer_model(folder: Path) -> None:
    model = str(make_model(folder / "only", "llama"))
    for config in ({"cudagraph_mode": MODE}, {"cudagraph_mode": "FULL_AND_PIECEWISE"}):
        with pytest.raises(DoesNotFit, match="records a step before the streams are bound"):
            steered_engine_args(
                model, {"twin": StreamSource(same_as="base")}, compilation_config=config
            )
    assert refused.graphs_of(None) == "NONE"
    plain = steered_engine_args(model, {"twin": StreamSource(same_as="base")})
    assert plain["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert refused.refusals({"compilation_config": {"cudagraph_mode": MODE}})


def test_without_refusals_every_token_after_the_first_is_noise(captured: Engine) -> None:
    """A replay runs the forward of a dummy batch: no control, so all scores are alike."""
    assert len(runner(captured.llm).cudagraph_manager.graphs) == 1
    for case, output in zip(CASES, captured.run(CASES), strict=True):
        right = captured.reference(case)
        # The prompt is not decoded: it runs without a graph.
        assert tokens(output)[0] == right[0].token
        assert logprobs(output)[0] == pytest.approx(right[0].logprob, abs=1e-4)
        assert tokens(output)[1:] == [0] * 4
        assert logprobs(output)[1:] == pytest.approx([-math.log(VOCAB_SIZE)] * 4, abs=1e-4)


def test_binding_refuses_what_the_platform_lets_pass(captured: Engine) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(v2, "refused_config", refused.refused_config)
        with pytest.raises(ValueError, match=f"got {MODE}.*before the streams are bound"):
            captured.llm.collective_rpc("coxswain_bind")
