"""The baseline loop is right: what it draws is what `generate` and plain arithmetic draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from load_tests.sequential import SequentialModels
from tests.models import make_model

PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [40, 41], [99, 7, 8, 9, 250], [5])
STEPS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sequential")
    kinds = ("llama", "qwen2", "gpt2")  # GPT-2 learns its positions: they must be right
    for seed, kind in enumerate(kinds):
        make_model(root / kind, kind, seed=seed)
    return [root / kind for kind in kinds]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def drawn(folders: Sequence[Path], weights: Sequence[float]) -> list[list[int]]:
    models = SequentialModels.load(folders, weights, torch.float32)
    return [list(row) for row in zip(*models.decode(PROMPTS, STEPS), strict=True)]


@pytest.mark.parametrize("which", range(3))
def test_one_model_draws_what_generate_draws(folders: list[Path], which: int) -> None:
    model = loaded(folders[which])
    for prompt, found in zip(PROMPTS, drawn([folders[which]], [1.0]), strict=True):
        own = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=None,
            eos_token_id=None,
        )
        assert own[0, len(prompt) :].tolist() == found


@torch.inference_mode()
def test_three_models_draw_the_largest_weighted_sum(folders: list[Path]) -> None:
    """Against whole forward passes of single, unpadded rows without caches."""
    weights = [1.0, 0.8, -0.8]
    models = [loaded(folder) for folder in folders]
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(STEPS):
            z = [model(torch.tensor([ids])).logits[0, -1] for model in models]
            ids.append(int(sum(w * own for w, own in zip(weights, z, strict=True)).argmax()))
        expected.append(ids[len(prompt) :])
    found = drawn(folders, weights)
    assert found == expected
    assert found != drawn(folders[:1], [1.0])
