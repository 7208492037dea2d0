"""Value models as `coxswain train value` writes them, served: every token, within 1e-4."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters.training.value.model import ValueModel
from steering.engine_args import StreamSource
from tests.engine.driver import BLOCK, Case, Engine
from tests.engine.heads import Headed, last_hidden
from tests.engine.test_exactness import prompt
from tests.engine.test_heads import assert_exact
from tests.models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.engine


def trained(folder: Path, architecture: str, rank: int | None) -> Headed:
    """What the recipe writes, every trained number off its start; read by other classes."""
    body, out = make_model(folder / "body", architecture, seed=31), folder / "out"
    model = ValueModel(body, rank=rank, alpha=8, mean=0.5, seed=1, device="cpu", dtype="float32")
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    model.write(out)
    read: Any = AutoModelForCausalLM.from_pretrained(body if rank else out, dtype=torch.float32)
    if rank:
        read = PeftModel.from_pretrained(read, str(out))
    head = load_file(out / ("v_head.safetensors" if rank else "model.safetensors"))
    weight, bias = (head[f"v_head.summary.{name}"].double() for name in ("weight", "bias"))
    source = (
        StreamSource(str(body), head="value", path=str(out))
        if rank
        else StreamSource(str(out), head="value")
    )
    return Headed(source, lambda ids: float(weight[0] @ last_hidden(read, ids) + bias[0]))


def make(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    return {
        "whole": trained(folder / "whole", "llama", None),
        "lora": trained(folder / "lora", "gpt2", 4),
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(tmp_path_factory.mktemp("models"), ("qwen2", VOCAB_SIZE), {}, make)
    yield found
    del found
    gc.collect()


def test_served_values_are_the_trained_ones(engine: Engine) -> None:
    draw = random.Random(1)
    cases = []
    for streams in (["whole"], ["lora"], ["whole", "lora"]):
        values = [{"stream": name, "strength": 2.0} for name in streams]
        spec = {"method": "value_augmented", "values": values, "top_k": 8}
        cases += [Case(prompt(draw, 5, 2 * BLOCK), spec, max_tokens=8) for _ in range(2)]
    assert_exact(engine, cases, engine.run(cases))
