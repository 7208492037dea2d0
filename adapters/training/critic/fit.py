"""Fits a critic: AdamW on the replies in batches, with checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from adapters.training.critic.classifiers import Classifier, Row
from adapters.training.critic.settings import CriticSettings
from adapters.training.descent import Descent


def fit(
    settings: CriticSettings,
    classifier: Classifier,
    rows: Sequence[Row],
    kept: Sequence[int],
    run: dict[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Trains a classifier in place, from the last checkpoint on if there is one.

    Args:
        settings: of the run.
        classifier: at its start.
        rows: all of them.
        kept: indices of those to train on.
        run: what identifies the run.
        folder: for checkpoints.
        say: takes lines for a person.

    Raises:
        BadRecipe: the loss is not finite any more.
    """
    weight = _weight(settings, rows, kept)

    def losses(start: int) -> Iterator[tuple[float, str]]:
        for batch in _batches(settings, kept, start):
            wanted = torch.tensor([float(y) for i in batch for y in rows[i].labels])
            loss = binary_cross_entropy_with_logits(
                classifier.scores(batch), wanted.to(settings.device), pos_weight=weight
            )
            loss.backward()
            yield (found := float(loss.detach())), f"loss {found:.3f}"

    Descent(
        "critic",
        classifier.parameters,
        [(list(classifier.parameters.values()), settings.peak)],
        settings.passes * math.ceil(len(kept) / settings.batch),
        settings.warm_up,
        settings.weight_decay,
        settings.save_every,
    ).run(run, folder, say, losses)


def _weight(settings: CriticSettings, rows: Sequence[Row], kept: Sequence[int]) -> Tensor:
    if settings.pos_weight != "auto":
        return torch.tensor(settings.pos_weight, device=settings.device)
    labels = [label for i in kept for label in rows[i].labels]
    return torch.tensor((len(labels) - sum(labels)) / sum(labels), device=settings.device)


def _batches(settings: CriticSettings, kept: Sequence[int], start: int) -> Iterator[list[int]]:
    """Rows of each step, from step `start` on; functions of seed and step alone."""
    per_epoch = math.ceil(len(kept) / settings.batch)
    for epoch in range(start // per_epoch, settings.passes):
        order = random.Random(f"{settings.seed} {epoch}").sample(kept, len(kept))
        for place in range(per_epoch):
            if epoch * per_epoch + place >= start:
                yield order[place * settings.batch : (place + 1) * settings.batch]
