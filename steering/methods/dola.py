"""DoLa: what the last layer knows and an earlier one does not.

Chuang, Xie, Luo, Kim, Glass, He, "DoLa: Decoding by Contrasting Layers Improves Factuality in
Large Language Models", ICLR 2024, arXiv 2309.03883:

    s = log p − log p_j    where p ≥ relative_top · max p

with j the one layer that is given, or of several the one whose distribution differs most from the
last layer's, chosen for each token. As the authors' code has it, that is `½ (KL(M ‖ p) + KL(M ‖
p_j))` with M = ½ (p + p_j); `jsd` gives the Jensen-Shannon divergence of the paper.

The paper gives other ids −∞; here they are set back, as in `contrastive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from steering.kernels.reference import SET_BACK
from steering.method import (
    Fraction,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    log_softmax,
)
from steering.plan import BASE, LayerKind, LayerRule, Recipe, Rule, RuleKind


class DolaConfig(MethodConfig):
    """Options of DoLa."""

    method: Literal["dola"]
    layers: tuple[StreamName, ...] = Field(
        min_length=1,
        description="Taps on the base. One is contrasted with; of several, for each token the one "
        "that differs most from the base.",
    )
    relative_top: Fraction = Field(
        0.1,
        description="Ids less probable to the base than this share, in (0, 1], of its most "
        "probable id are set back, below all others.",
    )
    jsd: bool = Field(
        False,
        strict=True,
        description="Whether layers differ by the Jensen-Shannon divergence, as the paper says. "
        "Else as the authors' code computes it, with both arguments of each term exchanged.",
    )


class Dola(Method[DolaConfig]):
    """log p − log p_j on the ids that the base finds plausible."""

    name = "dola"
    config = DolaConfig

    def resolve(self, config: DolaConfig, _snapshot: Snapshot) -> Recipe:
        """The weights 1 and −1, the plausibility rule, and how one layer is chosen."""
        kind = LayerKind.CONTRAST_JSD if config.jsd else LayerKind.CONTRAST
        return Recipe(
            {BASE: 1.0, **dict.fromkeys(config.layers, -1.0)},
            Rule(RuleKind.PLAUSIBLE, BASE, config.relative_top),
            layers=LayerRule(kind),
        )

    def reference(self, config: DolaConfig, logits: Mapping[str, Logits]) -> Logits:
        """The contrast with the layer that differs most, on the plausible set (eq. 2 to 5)."""
        final = log_softmax(logits[BASE])
        p = np.exp(final)
        early = [log_softmax(np.where(p > 0, logits[name], -np.inf)) for name in config.layers]
        contrast = final - max(early, key=lambda layer: self._differs(final, layer, config.jsd))
        finite = contrast[np.isfinite(contrast)]
        back = SET_BACK + finite.max() - finite.min()
        return np.where(p >= config.relative_top * p.max(), contrast, contrast - back)

    @staticmethod
    def _differs(final: Logits, layer: Logits, jsd: bool) -> float:
        p, q = np.exp(final[final > -np.inf]), np.exp(layer[final > -np.inf])
        mean = (p + q) / 2

        def kl(x: Logits, y: Logits) -> float:
            return float(np.sum(x * np.log(x / y)))

        if jsd:
            return (kl(p, mean) + kl(q, mean)) / 2
        return (kl(mean, p) + kl(mean, q)) / 2
