"""Value models' additions to candidates, in torch; `reference.value_offsets` is the definition.

Letters: n rows, K candidates of the row that has most.
"""

from __future__ import annotations

import torch

from steering.plan import Transform

TRANSFORMS: tuple[Transform, ...] = ("identity", "log_sigmoid", "clip")
"""Transforms of values, in the order of their numbers."""


def _transformed(values: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    bounded = torch.where(transform == 2, values.clamp(0, 1), values)
    return torch.where(transform == 1, torch.nn.functional.logsigmoid(values), bounded)


def value_offsets(
    values: torch.Tensor,
    prefix: torch.Tensor,
    valid: torch.Tensor,
    ending: torch.Tensor,
    from_prefix: torch.Tensor,
    left_out: torch.Tensor,
    transform: torch.Tensor,
    centre: torch.Tensor,
) -> torch.Tensor:
    """V − mean V of each row's candidates, [n, K] float32; 0 where there is none.

    Args:
        values: [n, K] float32 V(s⊕j).
        prefix: [n] float32 V(s).
        valid: [n, K] bool, which places hold a candidate.
        ending: [n, K] bool, which candidates end the text.
        from_prefix: [n] bool, rows whose rule for those is 'prefix'.
        left_out: [n] bool, rows whose rule is 'zero'.
        transform: [n] int64, the place in `TRANSFORMS` of what is made of each value.
        centre: [n] bool, rows that take the mean off.
    """
    values = _transformed(values, transform[:, None])
    prefix = _transformed(prefix, transform)
    values = torch.where(ending & from_prefix[:, None], prefix[:, None], values)
    counted = valid & ~(ending & left_out[:, None])
    kept = values.masked_fill(~counted, 0.0)
    mean = kept.sum(-1) / counted.sum(-1).clamp(min=1) * centre
    return (values - mean[:, None]).masked_fill(~counted, 0.0)
