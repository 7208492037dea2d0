"""Decoding-time realignment: how strongly to align, chosen per request.

Liu et al., "Decoding-time Realignment of Language Models", ICML 2024, arXiv 2402.02992:

    p ∝ p_reference^(1 − λ) · p_aligned^λ
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
    refusal,
)
from steering.plan import BASE, Recipe


class DeRaConfig(MethodConfig):
    """Options of decoding-time realignment."""

    method: Literal["dera"]
    reference: StreamName = Field(BASE, description="The model before alignment.")
    aligned: StreamName = Field(description="The model after alignment.")
    strength: Strength = Field(0.5, description="λ: 0 is the reference, 1 the aligned model.")

    @field_validator("aligned")
    @classmethod
    def _differs(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("reference"):
            raise refusal("aligned and reference must be different streams")
        return value


class DeRa(Method[DeRaConfig]):
    """λ s_aligned + (1 − λ) s_reference."""

    name = "dera"
    config = DeRaConfig

    def resolve(self, config: DeRaConfig, _snapshot: Snapshot) -> Recipe:
        """The weights λ and 1 − λ."""
        if config.strength == 0:
            return Recipe({config.reference: 1.0})
        return Recipe({config.reference: 1.0 - config.strength, config.aligned: config.strength})

    def reference(self, config: DeRaConfig, logits: Mapping[str, Logits]) -> Logits:
        """The paper's geometric mixture, as logarithms."""
        before, after = log_softmax(logits[config.reference]), log_softmax(logits[config.aligned])
        return before + config.strength * (after - before)
