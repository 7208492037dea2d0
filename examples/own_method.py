"""A steering method of one's own: the mean of two streams' scores, each by its own share.

A package offers it as an entry point of the group `coxswain.steering_methods.v1`, and a server
whose `plugins` names the package has it: docs/guide/write-a-method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from steering.errors import BadValue
from steering.kernels.reference import mix_reference
from steering.method import Limits, Logits, Method, MethodConfig, Snapshot, StreamName, log_softmax
from steering.plan import BASE, Recipe
from steering.resolve import resolve


class BlendConfig(MethodConfig):
    """What a request may write in its `steering` object."""

    method: Literal["blend"]
    other: StreamName = Field(description="The model that is blended in.")
    share: float = Field(0.5, ge=0, le=1, description="Its share; 0 is the base, 1 the other.")


class Blend(Method[BlendConfig]):
    """(1 − share) s_base + share s_other."""

    name = "blend"
    config = BlendConfig

    def resolve(self, config: BlendConfig, _snapshot: Snapshot) -> Recipe:
        """What the server runs: streams and their weights."""
        return Recipe({BASE: 1 - config.share, config.other: config.share})

    def reference(self, config: BlendConfig, logits: Mapping[str, Logits]) -> Logits:
        """The formula as the paper would have it: a geometric mean of two distributions."""
        base, other = log_softmax(logits[BASE]), log_softmax(logits[config.other])
        return base + config.share * (other - base)


if __name__ == "__main__":
    streams = Snapshot({"base": "lm", "chat": "lm"})
    methods = {Blend.name: Blend()}
    asked = {"method": "blend", "other": "chat", "share": 0.25}
    resolved = resolve(asked, methods=methods, snapshot=streams, limits=Limits())
    print("plan:", resolved.plan.weights)

    # The same distribution as the formula's, whatever the scores are.
    random = np.random.default_rng(0)
    logits = {name: random.normal(0, 4, 1000) for name in ("base", "chat")}
    config = BlendConfig.model_validate(asked, context=None)
    recipe = Blend().resolve(config, streams)
    got, wanted = mix_reference(recipe, logits), Blend().reference(config, logits)
    error = float(np.abs(log_softmax(got) - log_softmax(wanted)).max())
    print(f"largest difference to the formula: {error:.1e} nats")

    try:
        resolve({**asked, "share": 2}, methods=methods, snapshot=streams, limits=Limits())
    except BadValue as refusal:
        print("refused:", refusal)
