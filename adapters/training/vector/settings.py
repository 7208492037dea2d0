"""What a vector's training run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from adapters.training.checked import Checked, bad
from adapters.training.served import Served


@dataclass(frozen=True)
class VectorSettings(Checked):
    """One training run.

    Args:
        served: the server, which samples and tries vectors.
        body: folder of the served base, safetensors, with its tokenizer.
        out: folder of the vector, made at the end.
        pairs: JSONL file of contrast pairs; None: the best and the worst reply to each prompt.
        prompts: JSONL file of prompts: to sample from, and to try vectors on.
        reward: `FILE.py:FUNCTION`, a classifier's folder, or an address; None: layers are chosen by
            how well they separate pairs.
        admin_key: of the server, which loads vectors to try.
        samples: replies for each prompt; ≥ 1.
        max_tokens: ids in the longest reply; ≥ 1.
        temperature: of the samples; ≥ 0.
        top_p: of the samples, above 0, up to 1.
        reward_timeout_s: seconds that one reward may take; > 0.
        direction: `mean` of the pairs' differences, or their first principal `component`.
        states: read at the `last` token, or as the `mean` over the reply's tokens.
        weights: multiples of the direction to try, with a reward.
        tried: layers to try, with a reward: those that separate best; ≥ 1.
        held_out: share of pairs, and of prompts, for the choice; above 0, below 1.
        seed: of the samples and the split.
        device: torch's name of it, e.g. `cpu` or `cuda`.
        dtype: of the arithmetic, `float32` or `bfloat16`.
    """

    ELSEWHERE = frozenset({"served", "body", "out", "pairs", "prompts", "reward", "admin_key",
                           "reward_timeout_s", "device"})  # fmt: skip

    served: Served
    body: Path
    out: Path
    pairs: Path | None = None
    prompts: Path | None = None
    reward: str | None = None
    admin_key: str | None = None
    samples: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    reward_timeout_s: float = 30.0
    direction: str = "mean"
    states: str = "last"
    weights: str = "0.5,1,2,4"
    tried: int = 3
    held_out: float = 0.25
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def multiples(self) -> list[float]:
        """The weights as numbers.

        Raises:
            BadRecipe: they are none.
        """
        try:
            found = [float(text) for text in self.weights.split(",")]
        except ValueError:
            found = []
        if not found or not all(math.isfinite(w) and w for w in found):
            raise bad("weights", self.weights, "finite numbers other than 0, e.g. 0.5,1,2")
        return found

    def check(self) -> None:
        """Raises BadRecipe for the first value that cannot be used."""
        for key in ("samples", "max_tokens", "tried"):
            self._number(key, "≥ 1", lambda v: v >= 1)
        self._number("temperature", "≥ 0", lambda v: v >= 0)
        self._number("top_p", "above 0, up to 1", lambda v: 0 < v <= 1)
        self._number("held_out", "above 0, below 1", lambda v: 0 < v < 1)
        self._number("reward_timeout_s", "> 0", lambda v: v > 0)
        _ = self.multiples
        for key, words in (("direction", ("mean", "component")), ("states", ("last", "mean"))):
            if getattr(self, key) not in words:
                raise bad(key, getattr(self, key), ", ".join(words))
        self._check_dtype()
        if self.pairs is None and self.reward is None:
            raise bad("pairs", None, "a file; or --prompts with --reward")
        if (self.reward is None) != (self.prompts is None):
            raise bad("prompts", self.prompts, "--prompts and --reward, or neither")
        if self.pairs is None and (self.samples < 2 or self.temperature == 0):
            raise bad("samples", self.samples, "≥ 2 at a --temperature above 0, without --pairs")
