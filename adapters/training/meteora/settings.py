"""What a MeteoRA training run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.training.checked import Checked, bad

_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Settings(Checked):
    """One training run. The defaults of the loss are the paper's (arXiv 2405.13053, section 3.3).

    Args:
        base: folder of the base model, safetensors.
        adapters: name → folder of a PEFT LoRA adapter; the order is that of the gates' rows.
        data: name → JSONL file with examples of what this adapter is for.
        out: folder of the pack, made at the end.
        top_k: k, adapters per token, while training and the pack's own default; 1 to all.
        temperature: T that the pack asks for when it is served; > 0. Training is at T = 1.
        gate_factor: what the gates' mean cross-entropy is multiplied by; ≥ 0.
        gate_std: standard deviation of the gates at the start; > 0.
        steps: optimizer steps; ≥ 1.
        batch: examples per step; ≥ 1.
        turns: examples joined into one conversation, up to so many; 1 joins none.
        rate: learning rate of the gates; > 0.
        adapters_rate: learning rate of the adapters; None: they stay as they are.
        warm_up: share of the steps in which the rate rises, 0 to 1; then it falls as a cosine.
        weight_decay: AdamW's, ≥ 0.
        max_tokens: tokens of the longest example; None: the base's positions, 1024 at most.
        seed: of the gates' start and of the order of the examples.
        save_every: steps between checkpoints; ≥ 1.
        device: torch's name of it, e.g. `cpu` or `cuda`.
        dtype: of the arithmetic, `float32` or `bfloat16`; what is trained stays float32.
    """

    ELSEWHERE = frozenset({"base", "adapters", "data", "out", "save_every", "device"})

    base: Path
    adapters: dict[str, Path]
    data: dict[str, Path]
    out: Path
    top_k: int = 2
    temperature: float = 1.0
    gate_factor: float = 50.0
    gate_std: float = 1.0
    steps: int = 2000
    batch: int = 16
    turns: int = 1
    rate: float = 5e-4
    adapters_rate: float | None = None
    warm_up: float = 0.005
    weight_decay: float = 0.01
    max_tokens: int | None = None
    seed: int = 0
    save_every: int = 100
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """Raises BadRecipe for the first value that cannot be used."""
        if len(self.adapters) < 2:
            raise bad("adapter", sorted(self.adapters), "two or more: there is nothing to route")
        for name in self.adapters:
            if not _NAME.fullmatch(name):
                raise bad("adapter", name, "a name of up to 100 letters, digits, _ . -")
        if lacking := self.adapters.keys() ^ self.data.keys():
            raise bad(
                "data",
                sorted(self.data),
                f"one file for each of {_list(self.adapters)}, "
                f"and for no other (see {_list(lacking)})",
            )
        if not 1 <= self.top_k <= len(self.adapters):
            raise bad("top_k", self.top_k, f"1 to {len(self.adapters)}, the number of adapters")
        for key in ("temperature", "gate_std", "rate"):
            self._number(key, "> 0", lambda v: v > 0)
        for key in ("gate_factor", "weight_decay"):
            self._number(key, "≥ 0", lambda v: v >= 0)
        if self.adapters_rate is not None:
            self._number("adapters_rate", "> 0", lambda v: v > 0)
        self._number("warm_up", "0 to 1", lambda v: 0 <= v <= 1)
        for key in ("steps", "batch", "turns", "save_every"):
            self._number(key, "≥ 1", lambda v: v >= 1)
        if self.max_tokens is not None:
            self._number("max_tokens", "≥ 2", lambda v: v >= 2)
        self._check_dtype()


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
