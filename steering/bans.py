"""A bias of −100 is a ban, also where a rule sets ids back further than a bias reaches.

The OpenAI API says of `logit_bias` that −100 "should result in a ban". Beside a rule that sets all
but a few ids back by more than 100, the few would win under any bias that vLLM takes.
"""

from __future__ import annotations

from collections.abc import Mapping

from steering.plan import LayerKind, SteeringPlan

BAN = -100.0
"""The bias that bans; vLLM takes no lower one."""

BANNED = -1e6
"""What stands for it: more than any row's scores differ. Finite: where a grammar leaves only ids
that are banned, the best of them is drawn."""


def with_bans(bias: Mapping[int, float] | None, plan: SteeringPlan) -> dict[int, float] | None:
    """A request's `logit_bias` as the engine gets it.

    Args:
        bias: token id → what is added to its score, in [−100, 100]; None for none.
        plan: the request's.
    """
    if bias is None:
        return None
    evolves = any(rule.kind is LayerKind.EVOLVE for rule in plan.layered)
    masked = any(values.mask for values in plan.valued)
    sets_back = evolves or masked or any(rule.sets_back for rule in plan.rules)
    return banned(bias) if sets_back else dict(bias)


def banned(bias: Mapping[int, float]) -> dict[int, float]:
    """A `logit_bias` whose bans are as far below all other scores as no bias reaches."""
    return {i: BANNED if b <= BAN else b for i, b in bias.items()}
