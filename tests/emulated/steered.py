"""Steered engines on V2 whose decoding is replayed, for tests of the graphs of streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import Case, Engine, logprobs, tokens
from tests.models import VOCAB_SIZE

TOLERANCE = 1e-4
"""Nats, float32."""


def mix(**weights: float) -> dict[str, Any]:
    """A sum of streams."""
    return {"method": "mix", "weights": {"base": 1.0, **weights}}


def engine_in(folder: Path, streams: Any, **more: Any) -> Engine:
    """A small engine that captures."""
    small: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 8 << 20,
    }
    base = ("llama", VOCAB_SIZE)
    return Engine(folder, base, streams, enforce_eager=False, block_size=16, **small, **more)


def step_of(engine: Engine) -> Any:
    """What runs its streams."""
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    return worker.model_runner.get_model()._step


def check(engine: Engine, cases: Sequence[Case], outputs: Sequence[Any]) -> None:
    """Whether outputs are what `transformers` gives."""
    for output, case in zip(outputs, cases, strict=True):
        want = engine.reference(case)
        assert tokens(output) == [step.token for step in want]
        assert logprobs(output) == pytest.approx([s.logprob for s in want], abs=TOLERANCE)
