"""Classifier-free guidance for language models: away from a negative prompt.

Sanchez, Spangher, Fan, Levi, Biderman, "Stay on topic with Classifier-Free Guidance", ICML 2024,
arXiv 2306.17806:

    s = log p_negative + γ (log p_base − log p_negative)

The base reads the request's prompt; the stream `negative` reads a prompt of its own (`prompts`):
empty of the instruction, or a negative one. γ = 1 is the base, γ = 0 the negative stream alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from steering.method import (
    Companion,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    Strength,
    log_softmax,
)
from steering.plan import BASE, Recipe


class GuidanceConfig(MethodConfig):
    """Options of classifier-free guidance."""

    method: Literal["guidance"]
    negative: Companion = Field(
        description="The stream that reads the negative prompt, given in `prompts`."
    )
    strength: Strength = Field(
        1.5, description="γ: 1 is the base, above 1 moves away from the negative prompt."
    )


class Guidance(Method[GuidanceConfig]):
    """log p_negative + γ (log p_base − log p_negative)."""

    name = "guidance"
    config = GuidanceConfig

    def resolve(self, config: GuidanceConfig, _snapshot: Snapshot) -> Recipe:
        """The weights γ and 1 − γ; raw scores do, since each stream's normaliser cancels."""
        return Recipe({BASE: config.strength, config.negative: 1.0 - config.strength})

    def reference(self, config: GuidanceConfig, logits: Mapping[str, Logits]) -> Logits:
        """The formula as the paper writes it."""
        negative = log_softmax(logits[config.negative])
        return negative + config.strength * (log_softmax(logits[BASE]) - negative)
