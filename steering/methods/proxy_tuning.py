"""Proxy-tuning: a small tuned model's change, added to a big model's scores.

Liu, Han, Wang, Tsvetkov, Choi, Smith, "Tuning Language Models by Proxy", COLM 2024,
arXiv 2401.08565, eq. 1, with the strength α of its section on TruthfulQA:

    s = s_base + α (s_expert − s_anti_expert)

With `expert` or `anti_expert` set to `base` it is an extrapolation from, or an interpolation
between, two models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from steering.method import (
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    Strength,
    log_softmax,
    merged,
    refusal,
)
from steering.plan import BASE, Recipe


class ProxyTuningConfig(MethodConfig):
    """Options of proxy-tuning."""

    method: Literal["proxy_tuning"]
    expert: StreamName = Field(description="The small tuned model.")
    anti_expert: StreamName = Field(description="The small model before it was tuned.")
    strength: Strength = Field(
        1.0, description="α, how much of the change to add; 0 is the base, the paper uses 1."
    )

    @field_validator("anti_expert")
    @classmethod
    def _differs(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("expert"):
            raise refusal("expert and anti_expert must be different streams")
        return value


class ProxyTuning(Method[ProxyTuningConfig]):
    """s_base + α (s_expert − s_anti_expert)."""

    name = "proxy_tuning"
    config = ProxyTuningConfig

    def resolve(self, config: ProxyTuningConfig, _snapshot: Snapshot) -> Recipe:
        """The three weights 1, α, −α."""
        if config.strength == 0:
            return Recipe({BASE: 1.0})
        return Recipe(
            merged(
                (BASE, 1.0),
                (config.expert, config.strength),
                (config.anti_expert, -config.strength),
            )
        )

    def reference(self, config: ProxyTuningConfig, logits: Mapping[str, Logits]) -> Logits:
        """Eq. 1 in its product form, p_base · (p_expert / p_anti_expert)^α, as logarithms."""
        ratio = log_softmax(logits[config.expert]) - log_softmax(logits[config.anti_expert])
        return log_softmax(logits[BASE]) + config.strength * ratio
