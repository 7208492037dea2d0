"""Where a request's adapters act, as far as that depends on tokens: texts of the reply that bound
positions, and an aLoRA's invocation in the prompt.

Front end and tests; no torch. The worker has `steering.worker.plan.texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from adapters.where import MANY, Where
from steering.phases import closed, encoded, last_of
from steering.plan import AdapterUse, SteeringPlan


def with_text_ids(
    plan: SteeringPlan, encode: Callable[[str], Sequence[int]], field: str = "adapters"
) -> SteeringPlan:
    """The plan with the tokens of the texts that bound where its adapters act.

    Args:
        plan: with its adapters.
        encode: a text → the base's tokens, without any that stand for a text's begin or end.
        field: where they stand, for errors.

    Raises:
        BadValue: a text of too many tokens.
    """

    def known(where: Where) -> Where:
        after, until = (encoded(text, encode, field) for text in (where.after, where.until))
        return replace(where, after=after, until=until)

    if not any(where.texts for use in plan.adapters for where in use.where):
        return plan
    uses = (replace(use, where=tuple(map(known, use.where))) for use in plan.adapters)
    return replace(plan, adapters=tuple(uses))


def placed(plan: SteeringPlan, prompt: Sequence[int]) -> SteeringPlan:
    """The plan for a prompt: what it has closed already is behind the reply, and an aLoRA acts from
    the first token of its invocation's last occurrence; without one nowhere, as in PEFT.

    Args:
        plan: with the tokens of its texts.
        prompt: the base's ids.
    """
    if not any(use.invocation or any(w.texts for w in use.where) for use in plan.adapters):
        return plan
    own = dict(plan.prompts)
    found = (_placed(use, prompt, own.get(use.stream, prompt)) for use in plan.adapters)
    return replace(plan, adapters=tuple(use for use in found if use is not None))


def invoked(plan: SteeringPlan, prompt: Sequence[int]) -> list[AdapterUse]:
    """The aLoRAs of a plan that act on a prompt. Arguments as of `placed`."""
    own = dict(plan.prompts)
    aloras = (use for use in plan.adapters if use.invocation)
    return [use for use in aloras if last_of(own.get(use.stream, prompt), use.invocation) >= 0]


def _placed(use: AdapterUse, base: Sequence[int], own: Sequence[int]) -> AdapterUse | None:
    if use.invocation:
        start = last_of(own, use.invocation)
        return None if start < 0 else replace(use, where=(Where(last=len(own) - start, stop=MANY),))
    if not any(where.texts for where in use.where):
        return use
    places = []
    for where in use.where:
        if where.until is not None and closed(where.until, base):
            where = replace(where, start=0, stop=0, after=None, until=None)
        elif where.after is not None and closed(where.after, base):
            where = replace(where, after=None)
        places.append(where)
    return replace(use, where=tuple(places)) if any(w.stop or w.in_prompt for w in places) else None
