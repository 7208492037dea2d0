"""Guided search: the reply grows by blocks; of several drawn, the ones that score best are kept.

With x the prompt, y the reply so far and b_1 … b_K blocks drawn behind it:

    score(b) = w r(x ⊕ y ⊕ b) + Σ_t (log p_of(b_t) − log p_to(b_t))

Four papers are cases of it:

- blockwise best of K (Mudgal et al., "Controlled Decoding", arXiv 2310.17022): argmax of a value;
- chunk-level beam search (Zhou et al., "Weak-to-Strong Search", arXiv 2405.19262): W beams, the
  log-ratio of a small tuned and a small untuned model, over the whole reply;
- reward-guided speculation (Liao et al., arXiv 2501.19324): a small model draws a step, accepted
  if the reward is ≥ δ; else the base draws it again, unscored;
- guided speculative inference (Geuter et al., arXiv 2506.04118): a block is drawn from those of a
  small model ∝ exp(β r + log p_base − log p_small), accepted if that reaches u; else one of the
  base's is drawn ∝ exp(β r).

The log-probabilities are the streams' own at temperature 1, as in the releases, whatever the
tokens are drawn with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from steering.method import (
    BestOf,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    Weight,
    refusal,
)
from steering.plan import BASE, Recipe
from steering.search import Proposal, Scale, Score, Search

LARGEST = 1e6
"""Largest number that multiplies scores or is compared with them."""

Number = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST)]


def _as_weights(value: object) -> object:
    return {value: 1.0} if isinstance(value, str) else value


Draw = Annotated[dict[StreamName, Weight], BeforeValidator(_as_weights), Field(min_length=1)]
"""The sum that tokens are drawn from, stream → coefficient; the name of one stream will do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class BlockConfig(_Part):
    """Where a block ends: whichever comes first."""

    tokens: int | None = Field(None, strict=True, ge=1, description="After so many tokens.")
    until: str | None = Field(
        None, min_length=1, max_length=64, validate_default=True,
        description="With the token that completes this text.",
    )  # fmt: skip

    @field_validator("until")
    @classmethod
    def _ends(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("tokens", 1) is None:
            raise refusal("give tokens, until or both")
        return value


class LogRatioConfig(_Part):
    """The log-probabilities that two streams give the drawn tokens."""

    of: StreamName = Field(description="The stream whose log-probabilities are added.")
    to: StreamName = Field(description="The stream whose log-probabilities are subtracted.")

    @field_validator("to")
    @classmethod
    def _differs(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("of"):
            raise refusal("of and to must be different streams")
        return value


class ScoreConfig(_Part):
    """weight · r + Σ (log p_of − log p_to); either term may be left out."""

    value: StreamName | None = Field(
        None, description="The stream with a head, value or classifier, that gives r."
    )
    weight: Number = Field(1.0, description="Multiplies r.")
    scale: Scale = Field(
        "raw",
        description="What r is: the head's number x (a classifier's log-odds), the probability "
        "σ(x), or its logarithm.",
    )
    log_ratio: LogRatioConfig | None = Field(
        None, validate_default=True,
        description="Adds Σ (log p_of − log p_to) of the tokens: of the block, or, with several "
        "beams, of the whole reply.",
    )  # fmt: skip

    @field_validator("log_ratio")
    @classmethod
    def _something(
        cls, value: LogRatioConfig | None, info: ValidationInfo
    ) -> LogRatioConfig | None:
        if value is None and info.data.get("value", "") is None:
            raise refusal("give value, log_ratio or both")
        return value


class AcceptConfig(_Part):
    """When the kept block is taken."""

    at_least: Number = Field(description="δ: its score is as large as this, or larger.")


class FallbackConfig(_Part):
    """How a block is drawn again."""

    draw: Draw = Field({BASE: 1.0}, description="What its tokens are drawn from.")
    k: BestOf = Field(1, description="How many are drawn.")
    score: ScoreConfig | None = Field(
        None, validate_default=True, description="Chooses among them; needed for k above 1."
    )

    @field_validator("score")
    @classmethod
    def _scored(cls, value: ScoreConfig | None, info: ValidationInfo) -> ScoreConfig | None:
        if value is None and info.data.get("k", 1) > 1:
            raise refusal("a fallback that draws several blocks needs a score")
        return value


class GuidedSearchConfig(MethodConfig):
    """Options of guided search."""

    method: Literal["guided_search"]
    draw: Draw = Field(
        {BASE: 1.0},
        description="What blocks are drawn from: a stream's name, or stream → coefficient of a "
        "sum. The base runs only where it is named.",
    )
    block: BlockConfig = Field(BlockConfig(tokens=32), description="Where a block ends.")
    k: BestOf = Field(4, description="K, blocks that are drawn behind each beam.")
    beams: BestOf = Field(1, description="W, replies that are kept after each block.")
    score: ScoreConfig = Field(description="How good a block is.")
    choose: Literal["best", "sample"] = Field(
        "best",
        description="best: the W best are kept; sample: W are drawn, ∝ exp(beta · score).",
    )
    beta: float | None = Field(
        None, strict=True, gt=0, le=LARGEST,
        description="β of choose: sample; 1 if it is left out.",
    )  # fmt: skip
    accept: AcceptConfig | None = Field(
        None, description="When the kept block is taken; else it is drawn again by fallback."
    )
    fallback: FallbackConfig | None = Field(
        None, description="Draws the block again; left out: the base draws one, unscored."
    )

    @field_validator("beta")
    @classmethod
    def _of_sampling(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("choose") == "best":
            raise refusal("beta goes with choose: sample")
        return value

    @field_validator("accept")
    @classmethod
    def _one_beam(cls, value: AcceptConfig | None, info: ValidationInfo) -> AcceptConfig | None:
        if value is not None and info.data.get("beams", 1) > 1:
            raise refusal("accept goes with one beam")
        return value

    @field_validator("fallback")
    @classmethod
    def _of_accept(
        cls, value: FallbackConfig | None, info: ValidationInfo
    ) -> FallbackConfig | None:
        if value is not None and info.data.get("accept", value) is None:
            raise refusal("fallback goes with accept")
        return value


class GuidedSearch(Method[GuidedSearchConfig]):
    """The base or another sum; of blocks drawn from it those with the largest score."""

    name = "guided_search"
    config = GuidedSearchConfig

    def resolve(self, config: GuidedSearchConfig, _snapshot: Snapshot) -> Recipe:
        """The sum that blocks are drawn from, and the search."""
        fallback = config.fallback or FallbackConfig()
        return Recipe(
            dict(config.draw),
            search=Search(
                _proposal(config.draw, config.k, config.score),
                config.beams,
                config.block.tokens or 0,
                config.block.until or "",
                None if config.choose == "best" else config.beta or 1.0,
                None if config.accept is None else config.accept.at_least,
                None if config.accept is None
                else _proposal(fallback.draw, fallback.k, fallback.score),
            ),
        )  # fmt: skip

    def reference(self, config: GuidedSearchConfig, logits: Mapping[str, Logits]) -> Logits:
        """What each block's tokens are drawn from. `steering.search` chooses among blocks."""
        total = np.zeros_like(next(iter(logits.values())))
        for stream, weight in config.draw.items():
            if weight:
                total = total + weight * logits[stream]
        return total


def _proposal(draw: Mapping[str, float], k: int, score: ScoreConfig | None) -> Proposal:
    weights = tuple(sorted((s, float(c)) for s, c in draw.items() if c))
    if score is None:
        return Proposal(weights, k)
    of, to = (score.log_ratio.of, score.log_ratio.to) if score.log_ratio else ("", "")
    return Proposal(weights, k, Score(score.value or "", score.weight, score.scale, of, to))
