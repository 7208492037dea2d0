"""Contrastive decoding: what the base knows better than an amateur.

Li, Holtzman, Fried, Liang, Eisner, Hashimoto, Zettlemoyer, Lewis, "Contrastive Decoding", ACL
2023, arXiv 2210.15097 (the plausibility constraint, eq. 2), with the strength a of O'Brien and
Lewis, "Contrastive Decoding Improves Reasoning in Large Language Models", arXiv 2309.09117:

    s = (1 + a) log p_base − a log p_amateur    where p_base ≥ plausibility · max p_base

The paper gives other ids −∞. Here they are set back, below all of these by more than a bias can
lift: where a grammar or another constraint forbids all plausible ids, the best other id is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from steering.kernels.reference import SET_BACK
from steering.method import (
    Companion,
    Fraction,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    Strength,
    log_softmax,
)
from steering.plan import BASE, Recipe, Rule, RuleKind


class ContrastiveConfig(MethodConfig):
    """Options of contrastive decoding."""

    method: Literal["contrastive"]
    amateur: Companion = Field(description="The weaker model, whose preferences are subtracted.")
    strength: Strength = Field(
        0.5, description="a, how strongly the amateur is subtracted; 0 is the base, unmasked."
    )
    plausibility: Fraction = Field(
        0.1,
        description="Ids less probable to the base than this share, in (0, 1], of its most "
        "probable id are set back, below all others.",
    )


class Contrastive(Method[ContrastiveConfig]):
    """(1 + a) log p_base − a log p_amateur on the ids that the base finds plausible.

    Strength 0 also drops the mask: it is the base itself, not the base cut to plausible ids.
    """

    name = "contrastive"
    config = ContrastiveConfig

    def resolve(self, config: ContrastiveConfig, _snapshot: Snapshot) -> Recipe:
        """The weights 1 + a and −a, and the plausibility rule."""
        a = config.strength
        if a == 0:
            return Recipe({BASE: 1.0})
        rule = Rule(RuleKind.PLAUSIBLE, BASE, config.plausibility)
        return Recipe({BASE: 1.0 + a, config.amateur: -a}, rule)

    def reference(self, config: ContrastiveConfig, logits: Mapping[str, Logits]) -> Logits:
        """The contrast log p_base + a (log p_base − log p_amateur) on the plausible set (eq. 2)."""
        expert, amateur = log_softmax(logits[BASE]), log_softmax(logits[config.amateur])
        if config.strength == 0:
            return expert
        contrast = expert + config.strength * (expert - amateur)
        probability = np.exp(expert)
        plausible = probability >= config.plausibility * probability.max()
        finite = contrast[np.isfinite(contrast)]
        back = SET_BACK + finite.max() - finite.min()
        return np.where(plausible, contrast, contrast - back)
