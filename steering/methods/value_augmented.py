"""Value-augmented sampling: the base, with the value of what each likely token leads to.

Han, Shenfeld, Srivastava, Kim, Agrawal, "Value Augmented Sampling for Language Model Alignment and
Personalization", arXiv 2405.06639. With C the base's k most likely ids after s, V_m value models:

    s[j] = s_base[j] + Σ_m β_m (V_m(s⊕j) − mean over C of V_m)    for j in C, else s_base[j]

As in the authors' release, ids outside C are not masked and temperature comes afterwards. Theirs
leaves V(s⊕EOS) to a model that was never trained on it; `eos_value` chooses.

A stream with a q head gives Q(s, j) for every id j at once, as an unembedding gives scores: a
weight β in the sum, s_base + β Q(s, ·), and no candidates (Zhou et al., "Q♯", arXiv 2502.20548). A
constant added to all of Q changes nothing, so no mean is taken off.

`mask`, `centre: false` and `transform` make it ARGS (Khanov et al., arXiv 2402.01694: candidates
only, s + w r), RAD (Deng, Raffel, arXiv 2310.09520: clipped rewards) and FUDGE (Yang, Klein, arXiv
2104.05218: log σ of a classifier's log-odds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from steering.errors import BadValue
from steering.kernels.reference import SET_BACK
from steering.method import (
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    StreamName,
    Strength,
    TopK,
    refusal,
)
from steering.plan import BASE, Recipe, Values


class ValueTerm(BaseModel):
    """One value model."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    stream: StreamName = Field(description="The stream with a value or a q head.")
    strength: Strength = Field(1.0, description="β, how strongly its values count; 0: not at all.")


class ValueAugmentedConfig(MethodConfig):
    """Options of value-augmented sampling."""

    method: Literal["value_augmented"]
    values: tuple[ValueTerm, ...] = Field(
        min_length=1, max_length=16, description="The value models, each with its strength."
    )
    top_k: TopK = Field(
        20,
        description="k, how many of the base's most likely ids a value head evaluates; the rest "
        "stay. A q head evaluates all.",
    )
    eos_value: Literal["prefix", "zero", "model"] = Field(
        "prefix",
        description="What stands for the value of an id that ends the text: prefix: the value of "
        "the text so far; zero: nothing is added to it; model: what the value model says.",
    )

    mask: bool = Field(
        False, description="Sets all other ids back below the k candidates: only these are drawn."
    )
    centre: bool = Field(True, description="Takes the candidates' mean off each value.")
    transform: Literal["identity", "log_sigmoid", "clip"] = Field(
        "identity",
        description="What is made of each value: log_sigmoid of a classifier's log-odds; clip: "
        "into [0, 1].",
    )

    @field_validator("values")
    @classmethod
    def _once_each(cls, value: tuple[ValueTerm, ...]) -> tuple[ValueTerm, ...]:
        if len({term.stream for term in value}) < len(value):
            raise refusal("names the same stream twice")
        return value


class ValueAugmented(Method[ValueAugmentedConfig]):
    """s_base + Σ β (V − mean V) on the base's most likely ids, V being a value model's."""

    name = "value_augmented"
    config = ValueAugmentedConfig

    def resolve(self, config: ValueAugmentedConfig, snapshot: Snapshot) -> Recipe:
        """The base, and the values whose strength is not 0."""
        terms = [(term.stream, term.strength) for term in config.values if term.strength]
        scored = {s: b for s, b in terms if snapshot.streams.get(s) == "q"}
        asked = tuple((s, b) for s, b in terms if s not in scored)
        own = (config.mask, config.centre, config.transform)
        if scored and own != (False, True, "identity"):
            raise BadValue("mask, centre and transform are of value heads, not of q heads",
                           field="steering.values")  # fmt: skip
        values = Values(asked, config.top_k, config.eos_value, *own) if asked else None
        return Recipe({BASE: 1.0} | scored, values=values)

    def reference(self, config: ValueAugmentedConfig, logits: Mapping[str, Logits]) -> Logits:
        """The first formula above, where no candidate ends the text."""
        scores = logits[BASE].copy()
        candidates = sorted(range(scores.size), key=lambda j: -scores[j])[: config.top_k]
        ways: dict[str, Callable[[float], float]] = {
            "identity": lambda v: v,
            "log_sigmoid": lambda v: -np.log1p(np.exp(-v)),
            "clip": lambda v: min(max(v, 0.0), 1.0),
        }
        change = ways[config.transform]
        for term in config.values:
            after = [change(logits[term.stream][j]) for j in candidates]
            mean = np.mean(after) if config.centre else 0.0
            for j, value in zip(candidates, after, strict=True):
                scores[j] += term.strength * (value - mean)
        if config.mask and any(term.strength for term in config.values):
            known = scores[np.isfinite(scores)]
            others = [j for j in range(scores.size) if j not in set(candidates)]
            scores[others] -= SET_BACK + np.ptp(known)
        return scores
