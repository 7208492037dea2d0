"""What rides on the hidden states: `[h_0 | h_1 | … | control]`, one row per token.

`control` holds the row's coefficients and rule as float32 *bits* viewed in the model's dtype, so
a bf16 model carries them exactly and `compute_logits` is a pure function of its input: right for
sampled rows, speculative rows and prompt log-probabilities alike, whatever the row order.

Letters: T tokens of this step, R rows of logits, S streams (base first), H_i hidden sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

RULE_KIND, RULE_STREAM, RULE_PARAM, REPORT = range(4)
EXTRA = 4
"""Control columns behind the S coefficients: rule kind, rule stream, rule parameter, report row."""


class Control(NamedTuple):
    """The control part of R rows, float32 on the model's device."""

    coef: torch.Tensor
    """[R, S] coefficients c_i."""
    kind: torch.Tensor
    """[R] `RuleKind`."""
    stream: torch.Tensor
    """[R] index of the stream that the rule reads."""
    param: torch.Tensor
    """[R] the rule's parameter."""
    report: torch.Tensor
    """[R] 1 + index of the report this row belongs to, 0 for none."""


@dataclass(frozen=True)
class Layout:
    """Column layout of the steered model's hidden states.

    Args:
        sizes: H_i per stream, base first.
        dtype: dtype of the hidden states (2 or 4 bytes).
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def streams(self) -> int:
        """S."""
        return len(self.sizes)

    @property
    def control_width(self) -> int:
        """Columns of `dtype` that the control part takes."""
        return (self.streams + EXTRA) * 4 // self.dtype.itemsize

    @property
    def width(self) -> int:
        """All columns."""
        return sum(self.sizes) + self.control_width

    def columns(self, stream: int) -> slice:
        """Where stream i's hidden state lies."""
        start = sum(self.sizes[:stream])
        return slice(start, start + self.sizes[stream])

    def write_control(self, out: torch.Tensor, control: npt.NDArray[np.float32]) -> None:
        """Writes control rows into the first rows of `out`; the other rows get zeros.

        Args:
            out: [T, width] of `dtype`, changed in place.
            control: [t ≤ T, S + EXTRA] float32.
        """
        part = out[:, sum(self.sizes) :]
        bits = torch.from_numpy(np.ascontiguousarray(control)).view(self.dtype)
        part[: bits.shape[0]] = bits.to(part.device, non_blocking=True)
        part[bits.shape[0] :] = 0

    def read_control(self, hidden: torch.Tensor) -> Control:
        """The control part of R rows [R, width].

        vLLM's dummy sampler run passes random bits here, so anything may come out: values that
        no real row has are mapped to harmless ones instead of being trapped.
        """
        flat = hidden[:, sum(self.sizes) :].contiguous().view(torch.float32)
        flat = torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
        coef, extra = flat[:, : self.streams], flat[:, self.streams :]
        stream = extra[:, RULE_STREAM].clamp(0, self.streams - 1)
        return Control(coef, extra[:, RULE_KIND], stream, extra[:, RULE_PARAM], extra[:, REPORT])
