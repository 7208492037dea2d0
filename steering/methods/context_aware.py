"""Context-aware decoding: what the context changes, counted more than once.

Shi, Han, Lewis, Tsvetkov, Zettlemoyer, Yih, "Trusting Your Evidence: Hallucinate Less with
Context-aware Decoding", NAACL 2024, arXiv 2305.14739:

    s = (1 + a) s(y | context, question) − a s(y | question)

The base reads the request's prompt; the stream `without` reads a prompt of its own that lacks
the context (`prompts`), and is usually the base's weights again (`same_as: base`).
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


class ContextAwareConfig(MethodConfig):
    """Options of context-aware decoding."""

    method: Literal["context_aware"]
    without: Companion = Field(
        description="The stream that reads the prompt without the context, given in `prompts`."
    )
    strength: Strength = Field(
        0.5, description="a, how much more the context counts; 0 is the base."
    )


class ContextAware(Method[ContextAwareConfig]):
    """(1 + a) s_base − a s_without."""

    name = "context_aware"
    config = ContextAwareConfig

    def resolve(self, config: ContextAwareConfig, _snapshot: Snapshot) -> Recipe:
        """The weights 1 + a and −a."""
        a = config.strength
        if a == 0:
            return Recipe({BASE: 1.0})
        return Recipe({BASE: 1.0 + a, config.without: -a})

    def reference(self, config: ContextAwareConfig, logits: Mapping[str, Logits]) -> Logits:
        """The base, reweighted by the pointwise mutual information: p · (p / p_without)^a."""
        informed, uninformed = log_softmax(logits[BASE]), log_softmax(logits[config.without])
        return informed + config.strength * (informed - uninformed)
