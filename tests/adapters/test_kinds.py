"""Every kind of adapter that PEFT writes is computed as PEFT does, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraGAConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters.errors import BadAdapter
from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from tests.adapters.kinds import SERVED, Case, lora, make, make_base, with_peft
from tests.adapters.layers import loaded, with_parts

IDS = torch.tensor([[11, 40, 3, 77, 120, 9, 311, 42]])

Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Architecture → the folder of a tiny model."""
    return cache(lambda name: make_base(tmp_path_factory.mktemp(name), name))


def scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits.double()
    return found


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_served_kinds_are_what_peft_computes(case: Case, bases: Bases, tmp_path: Path) -> None:
    base = bases(case.base)
    folder = make(case, tmp_path, base, seed=3)
    inspect(folder, base_shapes(base), max_rank=64)
    ours = scores(with_parts(base, loaded(folder, base)))
    if case.change is not None:  # PEFT does not read it any more
        folder = make(Case(case.kind, case.config, case.base), tmp_path / "whole", base, seed=3)
    theirs = scores(with_peft(base, [folder]))
    plain = scores(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval())
    assert (theirs - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_adapters_that_changed_the_base_are_served_once_they_are_converted(
    init: str, bases: Bases, tmp_path: Path
) -> None:
    """As the sentence says by which they are refused."""
    base = bases("llama")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    random = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # what `preprocess_loraga` leaves there
            module._peft_loraga_grad = torch.randn(module.weight.shape, generator=random)
    more = {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
    model = get_peft_model(model, lora(init_lora_weights=init, **more)())
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    config.init_lora_weights = init
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(tmp_path / "as-it-is")
    trained = scores(model.eval())
    with pytest.raises(BadAdapter, match="path_initial_model_for_weight_conversion"):
        inspect(tmp_path / "as-it-is", base_shapes(base), max_rank=64)
    model.save_pretrained(
        tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before")
    )
    inspect(tmp_path / "after", base_shapes(base), max_rank=64)
    ours = scores(with_parts(base, loaded(tmp_path / "after", base)))
    assert (ours - trained).abs().max() < 1e-3  # PEFT computed in float32 on changed weights
