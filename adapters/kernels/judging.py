"""Conditions of adapters in torch: states of a pass decide gates of the layers behind (CAST).

A condition reads what a decoder layer hands on, before anything is added there; the vectors that it
gates act at that layer or behind it, so that every gate is known when it is needed. Of a prompt a
sum over its states is kept between the chunks in which it is read, and the decision for the reply.
Nothing here asks the device.

Letters: n tokens of a request in this pass, H the width, k columns of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Threshold:
    """One comparison of a condition.

    Args:
        layer: number of the decoder layer whose output is read.
        vector: [H] float32, on the device of the states.
        threshold: of the similarity.
        above: whether it is met above the threshold, else below it.
    """

    layer: int
    vector: torch.Tensor
    threshold: float
    above: bool


@dataclass(frozen=True, eq=False)
class LoadedCondition:
    """A condition with its vectors; see `adapters.formats.conditions.Condition`.

    Args:
        by_prompt: whether the prompt decides for the reply, else each token for itself.
        mean: whether a prompt's mean is compared, else its last state.
        projected: whether similarities are `projected`, else cosines.
        thresholds: of which one must be met, by layer.
    """

    by_prompt: bool
    mean: bool
    projected: bool
    thresholds: tuple[Threshold, ...]

    def met(self, at: Threshold, states: torch.Tensor) -> torch.Tensor:
        """[n] bool, whether states [n, H] meet a comparison; computed in float64."""
        found = similarity(states.double(), at.vector.double(), projected=self.projected)
        return found > at.threshold if at.above else found < at.threshold


def similarity(u: torch.Tensor, vector: torch.Tensor, *, projected: bool) -> torch.Tensor:
    """[n] the cosine of u with the vector, or with tanh of its projection on it.

    The projection (c cᵀ / c·c) u is c times a number, so no matrix is formed.

    Args:
        u: [n, H].
        vector: c, [H].
        projected: as in arXiv 2409.05907 (IBM/activation-steering, Apache-2.0).
    """
    other = vector[None]
    if projected:
        other = torch.tanh((u @ vector / (vector @ vector))[:, None] * vector)
    return torch.cosine_similarity(u, other, dim=-1, eps=1e-30)


@dataclass(eq=False)
class PromptState:
    """What is known of one request's prompt in one stream.

    Args:
        seen: how many of its tokens have been read.
        sums: layer → [H] float64, of the states of these.
        met: [] bool, what was decided; None before the prompt's end was read.
    """

    seen: int = 0
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    met: torch.Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """The prompt's tokens that a pass reads.

    Args:
        state: of the prompt; goes on from the pass before.
        tokens: [n] int64 places in the pass.
        starts: whether the first is the prompt's first.
        length: of the prompt if its last token is among them, else 0.
    """

    state: PromptState
    tokens: torch.Tensor
    starts: bool
    length: int


@dataclass(frozen=True)
class Gated:
    """The gates that a condition decides in a group (`adapters.kernels.gated.Group`).

    Args:
        gate: the group's, [·, R] float32; changed in place.
        rows: [n] int64 of it.
        columns: [k] int64 of it.
        weight: [n, k] float32, the gates where the condition is met.
    """

    gate: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    weight: torch.Tensor

    def write(self, met: torch.Tensor) -> None:
        """Opens the gates where a condition is met.

        Args:
            met: [n] or [] bool.
        """
        gates = self.weight * met.to(self.weight.dtype).view(-1, 1)
        self.gate[self.rows[:, None], self.columns] = gates


@dataclass(frozen=True)
class Judge:
    """A conditional adapter of one request in a pass.

    Args:
        condition: its.
        tokens: [n] int64 places in the pass of `gated.rows`.
        gated: what it decides there; None: nothing in this pass.
        prompt: where the prompt decides: its state.
        reading: the tokens of it that the pass reads; None: none.
    """

    condition: LoadedCondition
    tokens: torch.Tensor
    gated: Gated | None
    prompt: PromptState | None = None
    reading: Reading | None = None

    def judge(self, y: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
        """Reads a layer's output, if the condition does; opens or closes gates behind the last one.

        Args:
            y: [T, H].
            residual: [T, H]; the state is y + residual; None: it is y.
            layer: number of the decoder layer.
        """
        for at in self.condition.thresholds:
            if at.layer == layer:
                if self.prompt is None:
                    self._of_tokens(at, y, residual)
                else:
                    self._of_prompt(at, y, residual)
        last = layer == self.condition.thresholds[-1].layer
        if last and self.gated is not None and self.prompt is not None:
            assert self.prompt.met is not None, "a reply before its prompt's end"
            self.gated.write(self.prompt.met)

    def _of_tokens(
        self, at: Threshold, y: torch.Tensor, residual: torch.Tensor | None
    ) -> None:  # fmt: skip
        if self.gated is None:
            return
        thresholds = self.condition.thresholds
        met = self.condition.met(at, _states(y, residual, self.tokens))
        if at is not thresholds[0]:
            met |= self._met[0]
        self._met[:] = [met]
        if at is thresholds[-1]:
            self.gated.write(met)

    _met: list[torch.Tensor] = field(default_factory=list)

    def _of_prompt(
        self, at: Threshold, y: torch.Tensor, residual: torch.Tensor | None
    ) -> None:  # fmt: skip
        reading = self.reading
        if reading is None:
            return
        state, condition = reading.state, self.condition
        if condition.mean:
            own = _states(y, residual, reading.tokens).double().sum(0)
            state.sums[at.layer] = own if reading.starts else state.sums[at.layer] + own
        if not reading.length:
            return
        if condition.mean:
            u = state.sums.pop(at.layer)[None] / reading.length
        else:
            u = _states(y, residual, reading.tokens[-1:])
        met = condition.met(at, u)[0]
        if state.met is not None and at is not condition.thresholds[0]:
            met = met | state.met
        state.met = met


def _states(
    y: torch.Tensor, residual: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """[n, H] float32."""
    found = y[tokens].float()
    return found if residual is None else found + residual[tokens].float()


def judge_all(
    judges: Sequence[Judge], y: torch.Tensor, residual: torch.Tensor | None, layer: int
) -> None:
    """See `Judge.judge`."""
    for one in judges:
        one.judge(y, residual, layer)
