"""Collaborative decoding of critical tokens: the pretrained model's facts, the aligned one's form.

Jin, Peng, Song, Mi, Tian, Yu, "Collaborative decoding of critical tokens for boosting factuality of
large language models", arXiv 2402.17982. A classifier reads the prefix and gives q, the probability
that the next token is critical. With E the ids that end a text, which are the aligned model's:

    hard    q > threshold: the pretrained model's most likely id outside E; else: p_aligned
    soft    p(v) = (1 − q) p_aligned(v) + q (1 − p_aligned(E)) p_pretrained(v | v ∉ E)   for v ∉ E

The paper has no released code; it states the hard rule. Who ends the text is our choice: a
pretrained model would end replies wherever a document might end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from steering.kernels.reference import SET_BACK
from steering.method import (
    Logits,
    Method,
    MethodConfig,
    Probability,
    Snapshot,
    StreamName,
    log_softmax,
    refusal,
)
from steering.plan import BASE, Ender, Gate, Recipe, Rule, RuleKind


class CriticalTokensConfig(MethodConfig):
    """Options of collaborative decoding."""

    method: Literal["critical_tokens"]
    # `aligned` comes first: the validator of `pretrained` looks at it.
    aligned: StreamName = Field(
        BASE, description="The tuned model, which writes all tokens that are not critical."
    )
    pretrained: StreamName = Field(
        description="The model before it was tuned, which writes the critical tokens."
    )
    classifier: StreamName = Field(
        description="The stream with a classifier head that says how critical the next token is."
    )
    threshold: Probability = Field(
        0.5, description="A token is critical above this probability, in [0, 1]; hard rule only."
    )
    mode: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: critical tokens are the pretrained model's most likely ones; soft: the "
        "two distributions are mixed, the classifier's probability being the pretrained's share.",
    )

    @field_validator("pretrained")
    @classmethod
    def _differ(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("aligned"):
            raise refusal("pretrained and aligned must be different streams")
        return value


class CriticalTokens(Method[CriticalTokensConfig]):
    """The aligned model, with the pretrained one where the classifier finds a token critical."""

    name = "critical_tokens"
    config = CriticalTokensConfig

    def resolve(self, config: CriticalTokensConfig, _snapshot: Snapshot) -> Recipe:
        """The aligned stream alone in the sum, the pretrained one for the rule."""
        hard = config.mode == "hard"
        rule = Rule(
            RuleKind.SELECT,
            config.pretrained,
            config.threshold if hard else 0.0,
            config.classifier,
            gate=Gate.HEAD,
            hard=hard,
            ender=Ender.SUM,
            best=hard,
        )
        return Recipe({config.aligned: 1.0, config.pretrained: 1.0}, rule)

    def reference(self, config: CriticalTokensConfig, logits: Mapping[str, Logits]) -> Logits:
        """The formulas above, with no id that ends a text."""
        aligned, pretrained = (log_softmax(logits[s]) for s in (config.aligned, config.pretrained))
        critical = 1 / (1 + np.exp(-logits[config.classifier][0]))
        if config.mode == "soft":
            mixed = (1 - critical) * np.exp(aligned) + critical * np.exp(pretrained)
            with np.errstate(divide="ignore"):
                found: Logits = np.log(mixed)
            return found
        if critical <= config.threshold:
            return aligned
        # What stands behind the read-out may ban the id; then the next ones come up.
        only: Logits = pretrained - SET_BACK * (np.arange(pretrained.size) != pretrained.argmax())
        return only
