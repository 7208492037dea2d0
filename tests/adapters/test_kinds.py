"""Every kind of adapter that PEFT writes is computed as PEFT does, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from tests.adapters.kinds import SERVED, Case, make, make_base, with_peft
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
