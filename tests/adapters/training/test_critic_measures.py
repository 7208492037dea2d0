"""The table of a classifier's measures."""

from __future__ import annotations

import json
import random

import pytest
import torch

from adapters.training.critic.measures import measures, table
from tests.models import EOS, make_tokenizer


def test_measures_against_pairs_and_counts() -> None:
    rng = random.Random(8)
    scores = [rng.choice([-1.5, -0.2, 0.0, 0.3, rng.gauss(0, 1)]) for _ in range(90)]
    targets = [rng.random() < 1 / (1 + 2.7 ** (1 - s)) for s in scores]
    found = measures(torch.tensor(scores), torch.tensor(targets))
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, x in zip(scores, targets, strict=True) if x
        for b, y in zip(scores, targets, strict=True) if not y
    ]  # fmt: skip
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["critical"] == sum(targets) / 90
    for line, logit in zip(found["thresholds"], (-0.8473, 0.0, 0.8473), strict=True):
        marked = [s > logit for s in scores]
        hits = sum(m and t for m, t in zip(marked, targets, strict=True))
        p, r = hits / sum(marked), hits / sum(targets)
        assert (line["precision"], line["recall"]) == pytest.approx((p, r))
        assert line["f1"] == pytest.approx(2 * p * r / (p + r))
    assert f"AUC {found['auc']:.3f}" in table(found)


def test_measures_that_are_not_defined() -> None:
    found = measures(torch.tensor([-3.0, -2.0]), torch.tensor([False, False]))
    assert found["auc"] is None and found["critical"] == 0
    assert found["thresholds"][0] == {
        "threshold": 0.3, "precision": None, "recall": None, "f1": None
    }  # fmt: skip
    assert "–" in table(found) and json.loads(json.dumps(found)) == found


def test_the_ends_of_texts_are_ids_that_the_tests_can_see() -> None:
    assert EOS not in make_tokenizer()("x")["input_ids"]
