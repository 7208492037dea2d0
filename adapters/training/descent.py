"""The loop of every recipe: AdamW over batches, with checkpoints, from the newest one on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adapters.training import checkpoint
from adapters.training.errors import BadRecipe


@dataclass(frozen=True)
class Descent:
    """What is trained, and how.

    Args:
        name: on the progress bar.
        parameters: by name.
        peaks: parameters and their highest learning rate, each once; the first rate is --rate.
        steps: of the whole run, ≥ 1.
        warm_up: share of the steps in which the rate rises, before it falls as a cosine.
        weight_decay: of AdamW.
        save_every: steps between two checkpoints.
        advice: the allowed values of --rate, where the loss shows that this one is not.
    """

    name: str
    parameters: dict[str, Tensor]
    peaks: Sequence[tuple[Sequence[Tensor], float]]
    steps: int
    warm_up: float
    weight_decay: float
    save_every: int
    advice: str = "a lower one"

    def run(
        self,
        run: dict[str, Any],
        folder: Path,
        say: Callable[[str], None],
        losses: Callable[[int], Iterator[tuple[float, str]]],
        measure: Callable[[], str] = lambda: "",
    ) -> None:
        """Trains in place, from the newest checkpoint on if there is one.

        Args:
            run: what identifies the run.
            folder: for checkpoints.
            say: takes lines for a person.
            losses: from a step on: adds the gradients of each, and yields its loss and what to
                show of it.
            measure: what else to show; asked at the start and with each checkpoint.

        Raises:
            BadRecipe: a loss or its gradient is not finite any more.
        """
        groups = [{"params": list(some), "peak": peak} for some, peak in self.peaks]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        start = checkpoint.restore(folder, self.parameters, optimizer)
        if start:
            say(f"resumed after step {start} of {self.steps}")
        measured = measure()
        bar = tqdm(total=self.steps, initial=start, desc=self.name, unit="step", disable=None)
        for step, (loss, shown) in enumerate(losses(start), start):
            self._step(optimizer, step, loss)
            bar.update()
            last = step + 1 == self.steps
            saves = last or (step + 1) % self.save_every == 0
            if saves:
                checkpoint.save(folder, step + 1, run, self.parameters, optimizer)
                measured = measure()
            if saves or step % 10 == 0:
                bar.set_postfix_str(shown + measured, refresh=False)
            if saves and (last or bar.disable):  # No terminal: logs shall show that it goes on.
                say(f"step {step + 1} of {self.steps}: {shown}{measured}")
        bar.close()

    def _step(self, optimizer: torch.optim.Optimizer, step: int, loss: float) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not math.isfinite(loss + float(norm)):
            raise BadRecipe(
                f"the loss is not finite any more in step {step + 1}",
                field="--rate",
                value=self.peaks[0][1],
                allowed=self.advice,
            )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_share(step, self.steps, self.warm_up)
        optimizer.step()
        optimizer.zero_grad()


def rate_share(step: int, steps: int, warm_up: float) -> float:
    """Share of the highest rate, 0 to 1; of the step alone, so nothing is to restore.

    Args:
        step: from 0.
        steps: of the whole run.
        warm_up: share of the steps in which it rises, at least one step.
    """
    warm = max(1, round(warm_up * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
