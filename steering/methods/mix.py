"""A plain weighted sum of streams: ensembles, model arithmetic, anything linear.

With weights that sum to 1 it is multi-objective decoding for the reverse KL divergence: Shi,
Chen, Hu, Liu, Hajishirzi, Smith, Du, "Decoding-Time Language Model Alignment with Multiple
Objectives", NeurIPS 2024, arXiv 2406.18853:

    log p = Σ_i w_i log p_i    up to the normaliser

A mask keeps the ids that one stream, `judge`, finds likely, and sets all others back below them:
those with a share of its largest probability (`plausibility`), or among its most likely ones
(`top_k`, or `top_share` of its vocabulary, as in ULD, Ji et al., arXiv 2406.08607). With more than
one of these an id needs one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from steering.kernels.reference import SET_BACK, how_many
from steering.method import (
    Fraction,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    Weight,
    check_top_k,
    log_softmax,
    refusal,
)
from steering.plan import BASE, Recipe, Rule, RuleKind


class MixConfig(MethodConfig):
    """Options of a mix."""

    method: Literal["mix"]
    weights: dict[StreamName, Weight] = Field(
        min_length=1,
        description="Coefficient by stream; a stream that is left out (also base) counts 0.",
    )

    plausibility: Fraction | None = Field(
        None, description="Keeps ids with this share of the judge's largest probability, in (0, 1]."
    )
    top_k: int | None = Field(
        None,
        strict=True,
        ge=1,
        description="Keeps so many of the judge's most likely ids; of equals, all.",
    )
    top_share: Fraction | None = Field(
        None, description="The same as a share of its vocabulary, in (0, 1]; without `top_k`."
    )
    judge: StreamName = Field(
        BASE,
        validate_default=True,
        description="The stream by whose probabilities ids are kept; it has a weight.",
    )

    @field_validator("weights")
    @classmethod
    def _not_nothing(cls, value: dict[str, float]) -> dict[str, float]:
        if not any(value.values()):
            raise refusal("at least one weight must differ from 0")
        return value

    @field_validator("top_k")
    @classmethod
    def _allowed(cls, value: int | None, info: ValidationInfo) -> int | None:
        return value if value is None else check_top_k(value, info)

    @field_validator("top_share")
    @classmethod
    def _one_count(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("top_k") is not None:
            raise refusal("top_k and top_share do not go together: give one of the two")
        return value

    @field_validator("judge")
    @classmethod
    def _has_a_weight(cls, value: str, info: ValidationInfo) -> str:
        masks = any(info.data.get(n) is not None for n in ("plausibility", "top_k", "top_share"))
        if masks and not info.data.get("weights", {value: 1}).get(value):
            raise refusal("the judge needs a weight")
        return value

    @property
    def rule(self) -> Rule:
        """The mask."""
        count = self.top_k or self.top_share or 0
        if (count == 0 and self.plausibility is None) or self.top_share == 1:
            return Rule()
        share = 1.0 if self.plausibility is None else self.plausibility
        return Rule(RuleKind.PLAUSIBLE, self.judge, share, count=count)


class Mix(Method[MixConfig]):
    """Σ_i w_i s_i."""

    name = "mix"
    config = MixConfig

    def resolve(self, config: MixConfig, _snapshot: Snapshot) -> Recipe:
        """The weights as they are."""
        return Recipe(dict(config.weights), config.rule)

    def reference(self, config: MixConfig, logits: Mapping[str, Logits]) -> Logits:
        """The geometric mixture Π_i p_i^w_i, as logarithms."""
        powers = [
            weight * log_softmax(logits[stream])
            for stream, weight in config.weights.items()
            if weight
        ]
        product: Logits = np.sum(powers, axis=0)
        rule = config.rule
        if rule.kind is RuleKind.SUM:
            return product
        p = np.exp(log_softmax(logits[config.judge]))
        least = np.sort(p)[-how_many(rule.count, p.size)]
        kept = (p >= least) | (p >= rule.param * p.max())
        finite = product[np.isfinite(product)]
        return np.where(kept, product, product - SET_BACK - np.ptp(finite))
