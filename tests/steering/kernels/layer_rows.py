"""Random rows with rules over layers, and what the definition makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steering.kernels.reference import Scores, mix_reference
from steering.plan import BASE, LayerKind, LayerRule, Recipe, Rule, RuleKind


@dataclass
class LayerRows:
    """R rows over a base and S − 1 taps.

    Args:
        scores: [S] of [R, V] float64, −∞ on ids that are no token of the base.
        coef: [R, S].
        kind: [R].
        lost: [P] ids that are no token.
    """

    scores: list[Scores]
    coef: Scores
    kind: list[LayerKind]
    lost: list[int]

    @classmethod
    def draw(
        cls,
        rows: int,
        streams: int,
        size: int,
        kinds: tuple[LayerKind, ...],
        dtype: torch.dtype = torch.float32,
    ) -> LayerRows:
        """Taps that differ more and less from the base, of which each row has some."""
        rng = np.random.default_rng(rows * size)
        base = rng.normal(scale=3.0, size=(rows, size))
        early = [
            base * rng.uniform(0, 1, (rows, 1)) + rng.normal(scale=2.0, size=(rows, size))
            for _ in range(streams - 1)
        ]
        scores = [torch.tensor(s).to(dtype).double().numpy() for s in (base, *early)]
        coef = -(rng.random((rows, streams)) < 0.6).astype(np.float64)
        coef[(coef[:, 1:] == 0).all(1), 1] = -1.0
        coef[:, 0] = 1.0
        kind = [kinds[row % len(kinds)] for row in range(rows)]
        lost = sorted({int(i) for i in rng.integers(1, size, size // 10)}) if size > 2 else []
        return cls(scores, coef, kind, lost)

    def wanted(self, row: int, rule: Rule, rate: float = 0.0, top_k: int = 0) -> Scores:
        """[V] by the definition."""
        logits = {}
        for i, own in enumerate(self.scores):
            logits[BASE if i == 0 else f"tap{i}"] = s = own[row].copy()
            if i == 0:
                s[self.lost] = -np.inf
        weights = {name: c for name, c in zip(logits, self.coef[row], strict=True) if c}
        layers = LayerRule(self.kind[row], rate, top_k)
        return mix_reference(Recipe(weights, rule, layers=layers), logits)

    def base(self) -> torch.Tensor:
        """[R, V] float32, padding −∞."""
        found = torch.tensor(self.scores[0]).float()
        found[:, self.lost] = -torch.inf
        return found

    @property
    def marked(self) -> torch.Tensor:
        """[V] uint8: 1 where an id is no token."""
        found = torch.zeros(self.scores[0].shape[1], dtype=torch.uint8)
        found[self.lost] = 1
        return found


PLAUSIBLE = Rule(RuleKind.PLAUSIBLE, BASE, float(np.float32(0.1)))
