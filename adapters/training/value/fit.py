"""Fits a value model to rewards: AdamW on the replies in batches, with checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.training.descent import Descent
from adapters.training.value.model import ValueModel
from adapters.training.value.returns import explained, targets
from adapters.training.value.settings import ValueSettings


@dataclass(frozen=True)
class Row:
    """A reply with its reward.

    Args:
        ids: of prompt and reply.
        start: place of the first state, the prompt's last id.
        reward: r.
    """

    ids: list[int]
    start: int
    reward: float

    @property
    def length(self) -> int:
        """L, ids in the reply."""
        return len(self.ids) - 1 - self.start


Explained = dict[str, float | None]
"""Share of the held-out returns' variance that the values explain, by where in the reply."""


def fit(
    settings: ValueSettings,
    model: ValueModel,
    rows: Sequence[Row],
    held: Sequence[Row],
    run: dict[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> Explained:
    """Trains a model in place, from the last checkpoint on if there is one.

    Args:
        settings: the run.
        model: at its start.
        rows: to train on.
        held: to measure on.
        run: what identifies the run.
        folder: for checkpoints.
        say: takes lines for a person.

    Raises:
        BadRecipe: the loss is not finite any more.
    """
    measured: Explained = {}

    def losses(start: int) -> Iterator[tuple[float, str]]:
        for batch in _batches(settings, rows, start):
            loss = _loss(settings, model, batch)
            yield loss, f"loss {loss:.4f}, "

    def measure() -> str:
        nonlocal measured
        measured = explained_by(model, held, settings)
        return shown(measured)

    Descent(
        "value",
        model.parameters,
        [(list(model.parameters.values()), settings.rate)],
        settings.epochs * math.ceil(len(rows) / settings.batch),
        settings.warm_up,
        settings.weight_decay,
        settings.save_every,
        advice="a lower one, or rewards of a smaller size",
    ).run(run, folder, say, losses, measure)
    return measured


def shown(found: Explained) -> str:
    """For a person."""
    parts = [f"{k} {'–' if v is None else format(v, '.1%')}" for k, v in found.items()]
    return "held-out variance explained: " + ", ".join(parts) if parts else "nothing held out"


def _batches(settings: ValueSettings, rows: Sequence[Row], start: int) -> Iterator[list[Row]]:
    """Rows of each step, from step `start` on; functions of seed and step alone."""
    step = 0
    for epoch in range(settings.epochs):
        draw = random.Random(f"{settings.seed} {epoch}")
        # Not by length, though it would save padding: rewards often follow the length, and
        # batches of one length pull the head to and fro.
        for batch in _pieces(draw.sample(rows, len(rows)), settings.batch):
            if step >= start:
                yield batch
            step += 1


def _pieces(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    for at in range(0, len(rows), size):
        yield list(rows[at : at + size])


def _values(model: ValueModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """V, [B, S] float32, and which of them are states, [B, S] bool; S the most of a row."""
    lengths = torch.tensor([row.length for row in rows])
    starts = torch.tensor([row.start for row in rows])
    states = int(lengths.max()) + 1
    values = model.values([row.ids for row in rows], starts, states)
    return values, (torch.arange(states) <= lengths[:, None]).to(values.device)


def _loss(settings: ValueSettings, model: ValueModel, rows: Sequence[Row]) -> float:
    """½ · mean over the states of (V − target)²; adds its gradients."""
    values, real = _values(model, rows)
    lengths = torch.tensor([row.length for row in rows], device=values.device)
    rewards = torch.tensor([row.reward for row in rows], device=values.device)
    wanted = targets(values, lengths, rewards, gamma=settings.gamma, lambda_=settings.lambda_)
    loss = 0.5 * (values - wanted)[real].square().mean()
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def explained_by(model: ValueModel, rows: Sequence[Row], settings: ValueSettings) -> Explained:
    """How much of the returns' variance the values explain.

    Returns:
        Of all states, and of the replies' first, middle and last ones; empty without rows.
    """
    places: dict[str, list[tuple[float, float]]] = {"in all": [], "first": [], "middle": [],
                                                    "last": []}  # fmt: skip
    for batch in _pieces(sorted(rows, key=lambda row: len(row.ids)), 2 * settings.batch):
        values, _ = _values(model, batch)
        for row, found in zip(batch, values.tolist(), strict=True):
            pairs = [
                (found[t], settings.gamma ** (row.length - t) * row.reward)
                for t in range(row.length + 1)
            ]
            places["in all"] += pairs
            for name, t in (("first", 0), ("middle", row.length // 2), ("last", row.length)):
                places[name].append(pairs[t])
    if not rows:
        return {}
    tensors = {name: torch.tensor(pairs, dtype=torch.float64) for name, pairs in places.items()}
    return {name: explained(pairs[:, 0], pairs[:, 1]) for name, pairs in tensors.items()}
