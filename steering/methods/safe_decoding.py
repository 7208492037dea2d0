"""SafeDecoding: the first tokens of a reply lean on a model that was tuned to refuse.

Xu, Jiang, Niu, Jia, Lin, Poovendran, "SafeDecoding: Defending against Jailbreak Attacks via
Safety-Aware Decoding", ACL 2024, arXiv 2402.08983. For the first m tokens, with V_c the ids that
the n most likely ones of base and expert have in common, n ≥ c the least number that gives c or
more of them:

    p(v) ∝ p_base(v) + a (p_expert(v) − p_base(v))    for v in V_c, at least 10⁻⁸

and from then on the base alone, bit for bit. The expert is a companion, or the base's weights
again (`same_as: base`) with an adapter. Sampling parameters hold for these tokens as for all; the
paper's code draws them greedily. Its other ids have no probability; here they are set back, for
constraints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from steering.kernels.reference import FLOOR, SET_BACK
from steering.method import (
    Companion,
    Logits,
    Method,
    MethodConfig,
    Snapshot,
    Strength,
    TopK,
    log_softmax,
)
from steering.plan import BASE, Recipe, RecipePhase, Rule, RuleKind, Span


class SafeDecodingConfig(MethodConfig):
    """Options of SafeDecoding."""

    method: Literal["safe_decoding"]
    expert: Companion = Field(description="The model that was tuned to refuse.")
    strength: Strength = Field(3.0, description="a, how much the expert counts; 0 is the base.")
    tokens: int = Field(
        2, strict=True, ge=1, le=2**20, description="m, how many tokens of a reply lean on it."
    )
    shared: TopK = Field(
        5, description="c, the least number of ids that both models' top lists share."
    )


class SafeDecoding(Method[SafeDecodingConfig]):
    """The first m tokens from (1 − a) p_base + a p_expert, on ids that both find likely."""

    name = "safe_decoding"
    config = SafeDecodingConfig

    def resolve(self, config: SafeDecodingConfig, _snapshot: Snapshot) -> Recipe:
        """The base, and a phase of m tokens with the expert."""
        if config.strength == 0:
            return Recipe({BASE: 1.0})
        rule = Rule(RuleKind.SELECT, config.expert, config.strength, count=config.shared)
        first = RecipePhase(Span(stop=config.tokens), {BASE: 1.0, config.expert: 1.0}, rule)
        return Recipe({BASE: 1.0}, phases=(first,))

    def reference(self, config: SafeDecodingConfig, logits: Mapping[str, Logits]) -> Logits:
        """The formula above: a reply's first token."""
        base, expert = (np.exp(log_softmax(logits[s])) for s in (BASE, config.expert))
        if config.strength == 0:
            return logits[BASE].copy()
        order = [sorted(range(base.size), key=lambda v: (-p[v], v)) for p in (base, expert)]
        least = min(config.shared, base.size)
        common: set[int] = set()
        for n in range(least, base.size + 1):
            common = set(order[0][:n]) & set(order[1][:n])
            if len(common) >= least:
                break
        with np.errstate(divide="ignore"):
            found: Logits = np.log(base) - SET_BACK + FLOOR
        for v in common:
            if base[v] > 0:
                p = base[v] + config.strength * (expert[v] - base[v])
                found[v] = np.log(max(p, 1e-8))
        return found
