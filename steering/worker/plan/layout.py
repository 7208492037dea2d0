"""The columns beside the hidden states: `[h_0 | h_1 | … | control]`, one row per token.

`control` holds the row's coefficients and rule as float32 *bits* viewed in the model's dtype, so
a bf16 model carries them exactly and `compute_logits` is a pure function of its input: right for
sampled rows, speculative rows and prompt log-probabilities alike, whatever the row order.

Letters: T tokens of this step, R rows of logits, S streams (base first), H_i hidden sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

RULE_KIND, RULE_STREAM, RULE_PARAM, RULE_COUNT, RULE_OPTIONS, RULE_HEAD, ENDS = range(7)
LAYERS, LAYERS_RATE, LAYERS_TOP_K = range(7, 10)
EXTRA = 10
"""Control columns behind the S coefficients: rule kind, its stream, parameter, count, options and
head, set of ids that end a text; kind, rate and k of the rule over layers."""


CANDIDATES_ONLY = 64
"""Bit of the options: all ids but the row's candidates are set back."""


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
    counts: torch.Tensor
    """[R] the rule's count."""
    options: torch.Tensor
    """[R] the rule's options."""
    head: torch.Tensor
    """[R] index of the head that the rule reads; any number if it reads none."""
    ends: torch.Tensor
    """[R] which of the step's sets of ids ends the row's text."""
    layers: torch.Tensor
    """[R] `LayerKind`."""
    rate: torch.Tensor
    """[R] of the rule over layers."""
    top_k: torch.Tensor
    """[R] of the rule over layers."""
    ids: torch.Tensor
    """[R, K] candidate ids; 0 where there is none."""
    added: torch.Tensor
    """[R, K] what is added to their scores."""


@dataclass(frozen=True)
class Layout:
    """Column layout of the steered model's hidden states.

    Args:
        sizes: H_i per stream, base first.
        dtype: dtype of the hidden states (2 or 4 bytes).
        candidates: K, ids per row that something may be added to; 0 without value streams.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype
    candidates: int = 0

    @property
    def streams(self) -> int:
        """S."""
        return len(self.sizes)

    @property
    def control_width(self) -> int:
        """Columns of `dtype` that the control part takes."""
        return (self.streams + EXTRA + 2 * self.candidates) * 4 // self.dtype.itemsize

    @property
    def width(self) -> int:
        """All columns."""
        return sum(self.sizes) + self.control_width

    def columns(self, stream: int) -> slice:
        """Where stream i's hidden state lies."""
        start = sum(self.sizes[:stream])
        return slice(start, start + self.sizes[stream])

    def write_control(self, out: torch.Tensor, control: torch.Tensor) -> None:
        """Writes control rows into the first rows of `out`.

        Args:
            out: [T, width] of `dtype`, changed in place; its other control columns must be 0.
            control: [t ≤ T, S + EXTRA] float32, on the same device.
        """
        bits = control.view(self.dtype)
        start = sum(self.sizes)
        out[: bits.shape[0], start : start + bits.shape[1]] = bits

    def write_additions(
        self, out: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, added: torch.Tensor
    ) -> None:
        """Writes what is added to the scores of some rows.

        Args:
            out: [T, width] of `dtype`, its control written already; changed in place.
            rows: [n] int64.
            ids: [n, k ≤ K] int64 candidates, below 2²⁴.
            added: [n, k] float32.
        """
        both = torch.zeros(ids.shape[0], 2, self.candidates, device=out.device)
        both[:, 0, : ids.shape[1]] = ids
        # A masked row names nothing but its candidates; nothing is added to one that is repeated.
        both[:, 0, ids.shape[1] :] = ids[:, -1:]
        both[:, 1, : ids.shape[1]] = added
        bits = both.flatten(1).view(self.dtype)
        out[rows, out.shape[1] - bits.shape[1] :] = bits

    def read_coef(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, S] float32 coefficients of R rows [R, width] of a real step."""
        start = sum(self.sizes)
        width = self.streams * 4 // self.dtype.itemsize
        return hidden[:, start : start + width].contiguous().view(torch.float32)

    def read_control(self, hidden: torch.Tensor) -> Control:
        """The control part of R rows [R, width].

        vLLM's dummy sampler run passes random bits here, so anything may come out: values that
        no real row has are mapped to harmless ones instead of being trapped.
        """
        flat = hidden[:, sum(self.sizes) :].contiguous().view(torch.float32)
        flat = torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
        end, k = self.streams + EXTRA, self.candidates
        coef, extra = flat[:, : self.streams], flat[:, self.streams : end]
        stream = extra[:, RULE_STREAM].clamp(0, self.streams - 1)
        return Control(
            coef,
            extra[:, RULE_KIND],
            stream,
            extra[:, RULE_PARAM],
            extra[:, RULE_COUNT],
            extra[:, RULE_OPTIONS],
            extra[:, RULE_HEAD],
            extra[:, ENDS],
            extra[:, LAYERS],
            extra[:, LAYERS_RATE],
            extra[:, LAYERS_TOP_K],
            flat[:, end : end + k],
            flat[:, end + k :],
        )
