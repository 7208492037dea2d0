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
from tqdm import tqdm

from adapters.training import checkpoint
from adapters.training.classifiers import Classifier, Row
from adapters.training.critic_settings import CriticSettings
from adapters.training.errors import BadRecipe
from adapters.training.schedule import rate_share


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
    given = list(classifier.parameters.values())
    optimizer = torch.optim.AdamW(given, weight_decay=settings.weight_decay)
    start = checkpoint.restore(folder, classifier.parameters, optimizer)
    steps = settings.passes * math.ceil(len(kept) / settings.batch)
    if start:
        say(f"resumed after step {start} of {steps}")
    weight = _weight(settings, rows, kept)
    bar = tqdm(total=steps, initial=start, desc="critic", unit="step", disable=None)
    for step, batch in _batches(settings, kept, start):
        for group in optimizer.param_groups:
            group["lr"] = settings.peak * rate_share(step, steps, settings.warm_up)
        wanted = torch.tensor([float(y) for i in batch for y in rows[i].labels])
        loss = binary_cross_entropy_with_logits(
            classifier.scores(batch), wanted.to(settings.device), pos_weight=weight
        )
        loss.backward()
        norm, shown = torch.nn.utils.clip_grad_norm_(given, 1.0), float(loss.detach())
        if not math.isfinite(shown + float(norm)):
            raise BadRecipe(
                f"the loss is not finite any more in step {step + 1}",
                field="--rate",
                value=settings.peak,
                allowed="a lower one",
            )
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        last = step + 1 == steps
        if last or step % 10 == 0:
            bar.set_postfix_str(f"loss {shown:.3f}", refresh=False)
        if last or (step + 1) % settings.save_every == 0:
            checkpoint.save(folder, step + 1, run, classifier.parameters, optimizer)
            if last or bar.disable:  # No terminal: logs shall show that something happens.
                say(f"step {step + 1} of {steps}: loss {shown:.3f}")
    bar.close()


def _weight(settings: CriticSettings, rows: Sequence[Row], kept: Sequence[int]) -> Tensor:
    if settings.pos_weight != "auto":
        return torch.tensor(settings.pos_weight, device=settings.device)
    labels = [label for i in kept for label in rows[i].labels]
    return torch.tensor((len(labels) - sum(labels)) / sum(labels), device=settings.device)


def _batches(
    settings: CriticSettings, kept: Sequence[int], start: int
) -> Iterator[tuple[int, list[int]]]:
    """Step and rows, from step `start` on; functions of seed and step alone."""
    per_epoch = math.ceil(len(kept) / settings.batch)
    for epoch in range(start // per_epoch, settings.passes):
        order = random.Random(f"{settings.seed} {epoch}").sample(kept, len(kept))
        for place in range(per_epoch):
            if (step := epoch * per_epoch + place) >= start:
                yield step, order[place * settings.batch : (place + 1) * settings.batch]
