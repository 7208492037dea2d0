"""SLED: the last layer's scores, moved to where the layers' changes point.

Zhang, Li, Yang, Yang, Chen, "SLED: Self Logits Evolution Decoding for Improving Factuality in
Large Language Models", NeurIPS 2024, arXiv 2411.02433. For layer n and id i of the k most likely,

    c_ni = cos(z_n − z, p_n − e_i),  m_ni = max(c_ni, 0)²,  P(i) = Σ_n m_ni / Σ_n,i m_ni

and then ten times z ← z − rate (1 − t/10) (softmax(z) − P), t = 0 … 9.

The authors' code gives ids outside the k a floor; here they are set back, as in `contrastive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from steering.kernels.reference import MOST_KEPT, SET_BACK
from steering.method import Logits, Method, MethodConfig, Snapshot, StreamName, log_softmax
from steering.plan import BASE, LayerKind, LayerRule, Recipe


class SledConfig(MethodConfig):
    """Options of SLED."""

    method: Literal["sled"]
    layers: tuple[StreamName, ...] = Field(
        min_length=1,
        description="Taps on the base whose scores are compared with its own; the paper takes all "
        "layers.",
    )
    rate: float = Field(
        2.0, gt=0, le=10, strict=True, description="How far each step goes, in (0, 10]."
    )
    top_k: Annotated[int, Field(strict=True, ge=1, le=MOST_KEPT)] = Field(
        10,
        description="How many of the base's most likely ids are kept, 1 to "
        f"{MOST_KEPT}; the others are set back, below all of these.",
    )


class Sled(Method[SledConfig]):
    """The base's scores, evolved."""

    name = "sled"
    config = SledConfig

    def resolve(self, config: SledConfig, _snapshot: Snapshot) -> Recipe:
        """The base and its taps, and the rule that evolves the scores."""
        return Recipe(
            {BASE: 1.0, **dict.fromkeys(config.layers, -1.0)},
            layers=LayerRule(LayerKind.EVOLVE, config.rate, config.top_k),
        )

    def reference(self, config: SledConfig, logits: Mapping[str, Logits]) -> Logits:
        """The paper's algorithm 1, with the layers' weights ω_n written out."""
        known = np.isfinite(logits[BASE])
        z = logits[BASE][known]
        kept = np.flatnonzero(z >= np.sort(z)[-min(config.top_k, z.size)])
        estimates, sizes = [], []
        for name in config.layers:
            early = logits[name][known]
            change, p = early - z, np.exp(log_softmax(early))
            m = np.zeros(z.size)
            for i in kept:
                gradient = p.copy()
                gradient[i] -= 1
                length = np.sqrt(change @ change) * np.sqrt(gradient @ gradient)
                m[i] = max(change @ gradient / length, 0) ** 2 if length > 0 else 0
            sizes.append(m.sum())
            estimates.append(m / m.sum() if m.sum() > 0 else m)
        total = sum(sizes)
        weights = [size / total if total > 0 else 0.0 for size in sizes]
        latent = sum(w * m for w, m in zip(weights, estimates, strict=True))
        for t in range(10):
            z = z - config.rate * (1 - t / 10) * (np.exp(log_softmax(z)) - latent)
        found = np.full(logits[BASE].shape, -np.inf)
        back = SET_BACK + z.max() - z.min()
        found[known] = np.where(np.isin(np.arange(z.size), kept), z, z - back)
        return found
