"""Drafts of rows in which the draft stream has nothing that is allowed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steering.worker.runners.v1_speculation import Draws


def runner(allowed: torch.Tensor) -> Any:
    """A model runner between two steps, with random requests that may draw some ids only."""
    metadata = SimpleNamespace(
        all_greedy=False,
        temperature=torch.ones(len(allowed)),
        top_k=None,
        top_p=None,
        generators={},
        bad_words_token_ids={},
        no_penalties=True,
        allowed_token_ids_mask=~allowed,
    )
    ids = [str(i) for i in range(len(allowed))]
    asked = SimpleNamespace(sampling_params=SimpleNamespace(structured_outputs=None))
    return SimpleNamespace(
        input_batch=SimpleNamespace(sampling_metadata=metadata, req_ids=ids),
        requests=dict.fromkeys(ids, asked),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("lost", [-torch.inf, torch.nan])
def test_a_row_with_nothing_left_drafts_one_id_for_certain(lost: float) -> None:
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    allowed = torch.ones(3, 9, dtype=torch.bool)
    allowed[1, :6] = False
    scores[1, 6:] = lost
    draws = Draws(runner(allowed), np.arange(3))
    ids, chances = draws(scores.clone(), [])
    assert chances is not None
    assert chances.isfinite().all()
    assert torch.allclose(chances.sum(-1), torch.ones(3))
    assert chances[1].max() == 1 and chances[1, ids[1]] == 1
    assert torch.allclose(chances[[0, 2]], scores[[0, 2]].softmax(-1))
