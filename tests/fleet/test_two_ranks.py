"""Two ranks of one engine: adapters of every kind, packs, heads, values and speculation.

The same cases as in `tests/engine`, held to the same references.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import OPTConfig

from adapters.formats.base import base_shapes
from steering.engine_args import Speculation, adapter_engine_args
from steering.worker.base_layers import EngineLayers
from tests.adapters import kinds
from tests.adapters.layers import CheckpointLayers
from tests.engine import test_adapter_kinds as adapter_kinds
from tests.engine import test_heads as heads
from tests.engine import test_speculation as speculation
from tests.engine.driver import ERRORS, Case, Engine, Use
from tests.engine.test_exactness import assert_exact, mixed_cases, prompt
from tests.models import ARCHITECTURES, MAX_LENGTH, VOCAB_SIZE

pytestmark = [pytest.mark.fleet, pytest.mark.engine, pytest.mark.timeout(900)]

TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") is None:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


def _opt(**common: Any) -> OPTConfig:
    """Four heads: three cannot be split."""
    return OPTConfig(
        hidden_size=128, word_embed_proj_dim=128, ffn_dim=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, **common,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with biases, companions with biases and with fused layers, and a twin."""
    folder = tmp_path_factory.mktemp("models")
    streams: dict[str, tuple[str, int] | str] = {
        "opt": ("opt", VOCAB_SIZE),
        "plain": ("gpt2", VOCAB_SIZE),
        "twin": "base",
    }
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6}
    with patch.dict(ARCHITECTURES, opt=_opt):
        found = Engine(folder, ("qwen2", VOCAB_SIZE), streams, **slots, **TWO)
    made = {
        "base": adapter_kinds.BASE,
        "opt": adapter_kinds.COMPANION,
        "plain": adapter_kinds.FUSED,
    }
    for seed, (stream, configs) in enumerate(made.items()):
        base = found.folders[stream]
        folders = {
            name: kinds.make(kinds.Case(name, config), folder / name, base, seed=10 * seed + i)
            for i, (name, config) in enumerate(configs.items())
        }
        if stream == "base":
            folders["pack"] = adapter_kinds.make_pack(folder / "pack", base)
        found.load_adapters(folders, stream)
    yield found
    found.llm.llm_engine.engine_core.shutdown()
    del found
    gc.collect()


def test_adapters_of_every_kind(engine: Engine) -> None:
    asked: list[adapter_kinds.Asked] = [
        *((None, (Use(name),)) for name in adapter_kinds.ALONE),
        *((None, own) for own in adapter_kinds.MIXES),
        (None, ()),
        *adapter_kinds.STEERED,
    ]
    cases = adapter_kinds.batch(1, asked)
    assert_exact(engine, cases, engine.run(cases))
    print(f"\ntwo ranks: {len(cases)} requests with adapters, largest error {max(ERRORS):.1e}")
