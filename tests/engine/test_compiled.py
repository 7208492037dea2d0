"""Compiled code is kept for later starts, and only for engines whose layers are wrapped alike."""

from __future__ import annotations

import gc
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from steering.engine_args import adapter_engine_args
from tests.adapters.make import make_lora
from tests.engine.driver import Case, Engine, Use
from tests.engine.test_exactness import assert_exact, prompt
from tests.models import VOCAB_SIZE

pytestmark = [
    pytest.mark.engine,
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles CPU kernels with g++"),
]


def compiled(folder: Path, **more: Any) -> tuple[Engine, int, int]:
    """An engine, how many models were compiled for it, and how many were read from the cache."""
    from vllm.compilation.counter import compilation_counter as counter

    before = counter.num_aot_compiles, counter.num_aot_artifacts_loaded
    streams: dict[str, tuple[str, int] | str] = {"chat": ("qwen2", VOCAB_SIZE), "twin": "base"}
    engine = Engine(folder, ("llama", VOCAB_SIZE), streams, enforce_eager=False, **more)
    made, read = counter.num_aot_compiles, counter.num_aot_artifacts_loaded
    return engine, made - before[0], read - before[1]


def test_code_is_read_again_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    rng, own = random.Random(3), {"twin": range(60, 73)}
    steered = {"method": "mix", "weights": {"base": 1.0, "chat": 0.7, "twin": -0.4}}
    cases = [Case(prompt(rng, 10, 40), steered, own, max_tokens=6) for _ in range(4)]
    for made, read in ((2, 0), (0, 2)):  # the twin runs the base's
        engine, *found = compiled(tmp_path / "models")
        assert found == [made, read]
        assert_exact(engine, cases, engine.run(cases))
        lora = make_lora(tmp_path / "one", engine.folders["base"], seed=1)
        del engine
        gc.collect()
    # The same models; their layers add adapters now, which that code does not.
    engine, *found = compiled(tmp_path / "models", **adapter_engine_args(2, 16))
    assert found == [2, 0]
    engine.load_adapters({"one": lora})
    adapted = [
        Case(prompt(rng, 10, 40), steered, own, max_tokens=6, adapters=(Use("one"),))
        for _ in range(4)
    ]
    assert_exact(engine, adapted, engine.run(adapted))
