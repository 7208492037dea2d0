"""What a value model's training run is asked to do, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters.training.checked import Checked, bad
from adapters.training.served import Served


@dataclass(frozen=True)
class ValueSettings(Checked):
    """One training run. γ, λ and the epochs are the authors' (arXiv 2405.06639).

    Args:
        served: the server of the policy.
        prompts: JSONL file of prompts to sample from.
        reward: `FILE.py:FUNCTION`, a classifier's folder, or an address.
        body: folder of the model that becomes the value model, safetensors, with its tokenizer.
        out: folder of the value model, made at the end.
        rank: LoRA rank; None: the whole body is trained.
        alpha: the LoRA's α; None: twice the rank.
        samples: replies for each prompt; ≥ 1.
        max_tokens: ids in the longest reply; ≥ 1.
        temperature: of the samples; ≥ 0.
        top_p: of the samples, above 0, up to 1.
        reward_timeout_s: seconds that one reward may take; > 0.
        lambda_: λ, 0 to 1.
        gamma: γ, above 0, up to 1.
        epochs: passes over the replies; ≥ 1.
        batch: replies per step; ≥ 1.
        rate: highest learning rate; > 0.
        warm_up: share of the steps in which the rate rises, 0 to 1; then it falls as a cosine.
        weight_decay: AdamW's, ≥ 0.
        held_out: share of the prompts that is measured on, not trained on; 0 up to below 1.
        seed: of the samples, the split, the LoRA's start and the order of the replies.
        save_every: steps between checkpoints; ≥ 1.
        device: torch's name of it, e.g. `cpu` or `cuda`.
        dtype: of the arithmetic, `float32` or `bfloat16`; what is trained stays float32.
    """

    ELSEWHERE = frozenset(
        {"served", "prompts", "reward", "body", "out", "reward_timeout_s", "save_every", "device"}
    )

    served: Served
    prompts: Path
    reward: str
    body: Path
    out: Path
    rank: int | None = None
    alpha: float | None = None
    samples: int = 16
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    reward_timeout_s: float = 30.0
    lambda_: float = 0.95
    gamma: float = 1.0
    epochs: int = 2
    batch: int = 32
    rate: float = 1e-4
    warm_up: float = 0.05
    weight_decay: float = 0.0
    held_out: float = 0.1
    seed: int = 0
    save_every: int = 100
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """Raises BadRecipe for the first value that cannot be used."""
        for key in ("samples", "max_tokens", "epochs", "batch", "save_every"):
            self._number(key, "≥ 1", lambda v: v >= 1)
        if self.rank is not None:
            self._number("rank", "≥ 1", lambda v: v >= 1)
        if self.alpha is not None:
            self._number("alpha", "> 0", lambda v: v > 0)
            if self.rank is None:
                raise bad("alpha", self.alpha, "with --rank")
        self._number("temperature", "≥ 0", lambda v: v >= 0)
        if self.temperature == 0 and self.samples > 1:
            raise bad("samples", self.samples, "1, as replies at --temperature 0 are all the same")
        for key in ("top_p", "gamma"):
            self._number(key, "above 0, up to 1", lambda v: 0 < v <= 1)
        for key in ("lambda_", "warm_up"):
            self._number(key, "0 to 1", lambda v: 0 <= v <= 1)
        for key in ("reward_timeout_s", "rate"):
            self._number(key, "> 0", lambda v: v > 0)
        self._number("weight_decay", "≥ 0", lambda v: v >= 0)
        self._number("held_out", "0 up to below 1", lambda v: 0 <= v < 1)
        self._check_dtype()
