"""Adapters of a base whose layers are stored in four bits: its shapes are the engine's."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest

from adapters.formats.base import base_shapes, plain_shapes
from adapters.formats.inspect import inspect
from steering.engine_args import adapter_engine_args
from tests.adapters.four_bits import quantise
from tests.adapters.make import make_lora
from tests.engine.driver import Case, Engine, Use, logprobs
from tests.engine.test_exactness import prompt
from tests.models import make_model

pytestmark = pytest.mark.engine

TOLERANCE = 0.15
"""Nats. The engine computes in bfloat16, the reference in float32."""


def test_adapters_of_a_quantised_base(tmp_path: Path) -> None:
    packed, plain = quantise(make_model(tmp_path / "model", "llama"), tmp_path)
    lora = make_lora(tmp_path / "lora", plain, seed=1)
    assert base_shapes(packed).linear("model.layers.0.self_attn.q_proj") is None
    assert inspect(lora, plain_shapes(packed), max_rank=16).modules  # what doctor does
    engine = Engine(tmp_path, packed, {}, **adapter_engine_args(1, 16), dtype="bfloat16")
    assert engine.layers["base"]["model.layers.0.mlp.down_proj"] == (128, 192)
    engine.load_adapters({"one": lora})
    engine.folders["base"] = plain
    case = Case(prompt(random.Random(1), 30, 30), max_tokens=6, adapters=(Use("one"),))
    adapted, alone = engine.run([case, Case(case.prompt, max_tokens=6)])
    drawn = iter(adapted.outputs[0].token_ids)
    want = [step.logprob for step in engine.reference(case, choose=lambda _: next(drawn))]
    assert logprobs(adapted) == pytest.approx(want, abs=TOLERANCE)
    assert logprobs(adapted) != pytest.approx(logprobs(alone), abs=4 * TOLERANCE)
    del engine
    gc.collect()
