"""Best of n: several replies are drawn, and the one that a head likes best is the answer.

As in Stiennon, Ouyang et al., "Learning to summarize from human feedback", arXiv 2009.01325, where
a reward model chooses. With x the prompt, y_1 … y_n independent draws from the base and r the head:

    y = y_i,   i = argmax_i r(x ⊕ y_i)

r reads the whole reply, the id that ended it included. It is a value model, where V after an
ended reply estimates its reward, or a classifier, whose log-odds rank as its probabilities do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from steering.method import BestOf, Logits, Method, MethodConfig, Snapshot, StreamName
from steering.plan import BASE, Best, Recipe


class BestOfNConfig(MethodConfig):
    """Options of best of n."""

    method: Literal["best_of_n"]
    n: BestOf = Field(16, description="How many replies are drawn; one is returned.")
    value: StreamName = Field(
        description="The stream with a head, value or classifier, that says how good a reply is."
    )


class BestOfN(Method[BestOfNConfig]):
    """The base; of n of its replies the one with the largest value."""

    name = "best_of_n"
    config = BestOfNConfig

    def resolve(self, config: BestOfNConfig, _snapshot: Snapshot) -> Recipe:
        """The base alone, n times."""
        return Recipe({BASE: 1.0}, best=Best(config.value, config.n))

    def reference(self, _config: BestOfNConfig, logits: Mapping[str, Logits]) -> Logits:
        """What each reply's tokens are drawn from: the base. `best_reply` chooses among replies."""
        return logits[BASE].copy()
