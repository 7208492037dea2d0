"""Emulated fine-tuning: pre-training at one scale, fine-tuning at another.

Mitchell, Rafailov, Sharma, Finn, Manning, "An Emulator for Fine-tuning Large Language Models
using Small Language Models", ICLR 2024, arXiv 2310.12962. Two forms:

up-scaling, with the amplification β (`strength`) of the scale's share:

    log p = log p_tuned + β (log p_base − log p_reference)

  Outside the tuned model's top-p nucleus (`delta_top_p`) the bracket counts 0; the ids stay.

reward mixing, several tuned models of one reference:

    log p = log p_base + Σ_i w_i (log p_tuned_i − log p_reference)

Both hold up to the per-token normaliser. At β = 1, and for one reward of weight 1, they are
proxy-tuning at strength 1. The paper has no released code; the nucleus follows its description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from steering.method import (
    Fraction,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    Strength,
    Weight,
    log_softmax,
    merged,
    refusal,
)
from steering.plan import BASE, Recipe, Rule, RuleKind

_NOT_GIVEN = float("1")
"""The default strength, an object of its own: with rewards, which have weights, 1.0 is refused."""


class Reward(BaseModel):
    """One tuned model, read as the reward it was tuned for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    tuned: StreamName = Field(description="The small tuned model.")
    weight: Weight = Field(description="w_i, how much of its change to add.")


class EmulatedFineTuningConfig(MethodConfig):
    """Options of emulated fine-tuning: `tuned` (up-scaling) or `rewards` (reward mixing)."""

    method: Literal["emulated_fine_tuning"]
    # `reference` and `rewards` come first: the validators of the later fields look at them.
    reference: StreamName = Field(
        description="The small model before it was tuned, common to all tuned models."
    )
    rewards: tuple[Reward, ...] | None = Field(
        None, min_length=1, description="Reward mixing: tuned models with weights."
    )
    tuned: StreamName | None = Field(
        None, validate_default=True, description="Up-scaling: the small tuned model."
    )
    strength: Strength = Field(
        _NOT_GIVEN,
        description="Up-scaling: β, how much the base's scale counts; 0 is the tuned model.",
    )
    delta_top_p: Fraction | None = Field(
        None,
        description="Up-scaling: the scale counts only inside the tuned model's nucleus of this "
        "mass, in (0, 1]; null turns the filter off.",
    )

    @field_validator("rewards")
    @classmethod
    def _rewards_differ(
        cls, value: tuple[Reward, ...] | None, info: ValidationInfo
    ) -> tuple[Reward, ...] | None:
        if any(reward.tuned == info.data.get("reference") for reward in value or ()):
            raise refusal("a tuned stream and reference must be different streams")
        return value

    @field_validator("strength", mode="wrap")
    @classmethod
    def _of_up_scaling(
        cls, value: object, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> float:
        if value is _NOT_GIVEN and info.data.get("rewards") is not None:
            return _NOT_GIVEN
        cls._one_form(value, info)
        return float(check(value))

    @field_validator("tuned", "delta_top_p")
    @classmethod
    def _one_form(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("rewards") is not None and value is not None:
            raise refusal(f"rewards and {info.field_name} do not go together: give one of the two")
        return value

    @field_validator("tuned")
    @classmethod
    def _three_streams(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            if info.data.get("rewards") is None:
                raise refusal("give tuned (up-scaling) or rewards (reward mixing)")
            return value
        if BASE in (value, info.data.get("reference")) or value == info.data.get("reference"):
            raise refusal("up-scaling needs three different streams: base, tuned and reference")
        return value


class EmulatedFineTuning(Method[EmulatedFineTuningConfig]):
    """s_tuned + β (s_base − s_reference), or s_base + Σ w_i (s_tuned_i − s_reference)."""

    name = "emulated_fine_tuning"
    config = EmulatedFineTuningConfig

    def resolve(self, config: EmulatedFineTuningConfig, _snapshot: Snapshot) -> Recipe:
        """The weights, and the nucleus rule where a filter is asked for and can matter."""
        reference = config.reference
        if config.rewards is not None:
            terms = [(BASE, 1.0)]
            for reward in config.rewards:
                terms += [(reward.tuned, reward.weight), (reference, -reward.weight)]
            return Recipe(merged(*terms))
        assert config.tuned is not None, "checked by the config"
        beta = config.strength
        weights = merged((config.tuned, 1.0), (BASE, beta), (reference, -beta))
        if config.delta_top_p is None or beta == 0:
            return Recipe(weights)
        return Recipe(weights, Rule(RuleKind.NUCLEUS, config.tuned, config.delta_top_p))

    def reference(self, config: EmulatedFineTuningConfig, logits: Mapping[str, Logits]) -> Logits:
        """The formulas above, on log-probabilities."""
        log_p = {stream: log_softmax(scores) for stream, scores in logits.items()}
        small = log_p[config.reference]
        if config.rewards is not None:
            return _add(log_p[BASE], [r.weight * (log_p[r.tuned] - small) for r in config.rewards])
        assert config.tuned is not None, "checked by the config"
        tuned = log_p[config.tuned]
        scale = config.strength * (log_p[BASE] - small)
        if config.delta_top_p is not None:
            scale = np.where(_nucleus(np.exp(tuned), config.delta_top_p), scale, 0.0)
        return tuned + scale


def _add(start: Logits, deltas: Sequence[Logits]) -> Logits:
    for delta in deltas:
        start = start + delta
    return start


def _nucleus(probability: Logits, p: float) -> npt.NDArray[np.bool_]:
    """[V] bool: the smallest set of most probable ids whose mass reaches p; all ids at p = 1."""
    inside = np.full(probability.shape, p == 1.0)
    mass = 0.0
    for token_id in sorted(range(len(probability)), key=lambda i: (-probability[i], i)):
        if mass >= p:
            break
        inside[token_id] = True
        mass += float(probability[token_id])
    return inside
