"""A plain weighted sum of streams: ensembles, model arithmetic, anything linear.

With weights that sum to 1 it is multi-objective decoding for the reverse KL divergence: Shi,
Chen, Hu, Liu, Hajishirzi, Smith, Du, "Decoding-Time Language Model Alignment with Multiple
Objectives", NeurIPS 2024, arXiv 2406.18853:

    log p = Σ_i w_i log p_i    up to the normaliser
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from steering.method import (
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    Weight,
    log_softmax,
    refusal,
)
from steering.plan import Recipe


class MixConfig(MethodConfig):
    """Options of a mix."""

    method: Literal["mix"]
    weights: dict[StreamName, Weight] = Field(
        min_length=1,
        description="Coefficient by stream; a stream that is left out (also base) counts 0.",
    )

    @field_validator("weights")
    @classmethod
    def _not_nothing(cls, value: dict[str, float]) -> dict[str, float]:
        if not any(value.values()):
            raise refusal("at least one weight must differ from 0")
        return value


class Mix(Method[MixConfig]):
    """Σ_i w_i s_i."""

    name = "mix"
    config = MixConfig

    def resolve(self, config: MixConfig, _snapshot: Snapshot) -> Recipe:
        """The weights as they are."""
        return Recipe(dict(config.weights))

    def reference(self, config: MixConfig, logits: Mapping[str, Logits]) -> Logits:
        """The geometric mixture Π_i p_i^w_i, as logarithms."""
        powers = [
            weight * log_softmax(logits[stream])
            for stream, weight in config.weights.items()
            if weight
        ]
        product: Logits = np.sum(powers, axis=0)
        return product
