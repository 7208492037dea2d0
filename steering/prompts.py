"""Prompts of different lengths on one request. Front end only.

vLLM gives a request as many KV slots as its prompt has tokens, and all streams store their
tokens in those slots. So the request's prompt must be the longest of its streams'; shorter ones
leave the last slots of the prompt unused and run at an offset (DESIGN.md section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import BadValue
from steering.plan import SteeringPlan


def align(base_ids: Sequence[int], plan: SteeringPlan) -> tuple[list[int], int]:
    """The prompt to give to vLLM, and how much longer it is than the base's.

    The padding is the base prompt's own first token, in front: that token is in the prompt
    anyway, so penalties that look at the *set* of prompt tokens see the same one. No stream
    reads the padding.

    Args:
        base_ids: the request's own prompt, at least one token.
        plan: complete, with the token ids of own prompts.

    Returns:
        (token ids, pad): `pad` copies of the first token in front of `base_ids`, pad ≥ 0.

    Raises:
        BadValue: the prompt is empty.
    """
    if not base_ids:
        raise BadValue("the prompt has no tokens", field="prompt")
    longest = max((len(ids) for name, ids in plan.prompts if name in plan.streams), default=0)
    pad = max(0, longest - len(base_ids))
    return [base_ids[0]] * pad + list(base_ids), pad
