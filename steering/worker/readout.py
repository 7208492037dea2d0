"""The read-out: hidden states of all streams → the steered model's scores.

Lives in the worker, called from `compute_logits`, before grammar mask, penalties and sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from steering.kernels.mix import NEVER, mix
from steering.plan import CRITICAL_KINDS
from steering.worker.ends import EndSets
from steering.worker.layout import Control, Layout
from steering.worker.watch import Watch

if TYPE_CHECKING:  # it imports vLLM, which the arithmetic here does not need
    from steering.worker.one_product import OneProduct

Unembed = Callable[[torch.Tensor], torch.Tensor | None]
"""[R, H] hidden states → [R, V] logits in the model's dtype (None on ranks that hold none)."""


Head = Callable[[torch.Tensor], torch.Tensor]
"""[R, H] hidden states → [R] float32."""


class Reading(NamedTuple):
    """A head and the stream whose hidden states it reads."""

    stream: int
    head: Head


class Mixed(NamedTuple):
    """R rows of scores, and what they were made of."""

    z: torch.Tensor
    """[R, V] float32 scores of the steered model."""
    base: torch.Tensor
    """[R, V] the base's own, in whatever dtype."""
    control: Control
    """The rows' control."""
    critical: torch.Tensor | None = None
    """[R] float32 log-odds of the rows' classifier heads, if there are any."""


@dataclass(frozen=True)
class Vocabulary:
    """How a stream's vocabulary lies over the base's.

    Args:
        unshared: [U] int64 ids of the base's table that are not the same token in both; None if
            there are none.
        lacking: whether any of them is a token of the base.
        read_as: [V] int64, the stream's id for each of the base's; None if they are the same.
    """

    unshared: torch.Tensor | None = None
    lacking: bool = False
    read_as: torch.Tensor | None = None


@dataclass(frozen=True)
class Readout:
    """Mixes R rows of hidden states into scores over the base's vocabulary.

    Args:
        layout: where the parts of a row lie.
        unembed: per stream, base first; None for the body of a head.
        vocabularies: per stream, base first (the base's is empty).
        padded: [P] int64 ids of the base's table that are no token: never sampled when steered.
        heads: classifier heads.
        ends: ids that end a text.
        watch: told of every stream's scores.
        one_product: for rows that all sum the same streams; None if there is none.
    """

    layout: Layout
    unembed: Sequence[Unembed | None]
    vocabularies: Sequence[Vocabulary]
    padded: torch.Tensor | None
    heads: Sequence[Reading] = ()
    ends: EndSets = field(default_factory=lambda: EndSets((), 0))
    watch: Watch = field(default_factory=lambda: Watch(()))
    one_product: OneProduct | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        active: Sequence[bool],
        has_rules: bool,
        uniform_sum: bool = False,
    ) -> Mixed | None:
        """Scores of R rows.

        Args:
            hidden: [R, width] rows of the steered model's hidden states.
            active: [S] which streams ran in this step. A stream that did not is not in any sum.
            has_rules: whether any row of this step has a rule other than the plain sum.
            uniform_sum: whether all rows sum the same streams, the base and more. Then nobody
                waits for the device to learn which rows use what.

        Returns:
            The scores with what they were made of, or None on ranks that hold no logits.
        """
        control = self.layout.read_control(hidden)
        active = [ran and u is not None for ran, u in zip(active, self.unembed, strict=True)]
        base = self._unembed(0, hidden[:, self.layout.columns(0)].contiguous())
        if base is None:
            for i in range(1, self.layout.streams):
                if active[i]:  # the gather inside is collective: every rank takes part
                    self._unembed(i, hidden[:, self.layout.columns(i)].contiguous())
            return None
        self.watch.begin(len(base), base.device)
        self.watch.scores(0, base)
        mixed = self._mixed(base, hidden, control, active, has_rules, uniform_sum)
        self.watch.end(control.request)
        return mixed

    def in_one(self, hidden: torch.Tensor, active: Sequence[bool]) -> torch.Tensor | None:
        """[R, V] float32 scores by one product; None where these streams have none.

        Args:
            hidden: [R, width], rows that all sum the same streams, the base and more.
            active: [S] which streams these are.
        """
        if self.one_product is None or self._lacking(active):
            return None
        z = self.one_product(hidden, active)
        if z is None:
            return None
        self.watch.begin(len(z), z.device)
        largest = z.amax(-1)
        for i, ran in enumerate(active):
            if ran:
                self.watch.numbers(i, largest)
        self.watch.end(self.layout.read_control(hidden).request, partial(self._at_fault, hidden))
        z = z.float()
        if self.padded is not None:
            z[:, self.padded] = NEVER
        return z

    def _at_fault(self, hidden: torch.Tensor, row: int) -> int:
        """The bits of the streams whose own scores on a row are no numbers: they are made anew."""
        coef, found = self.layout.read_coef(hidden)[row].tolist(), 0
        for i, c in enumerate(coef):
            if c:
                own = self._unembed(i, hidden[row : row + 1, self.layout.columns(i)].contiguous())
                assert own is not None
                found |= int(not own.amax().isfinite()) << i
        return found

    def _mixed(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        control: Control,
        active: Sequence[bool],
        has_rules: bool,
        uniform_sum: bool,
    ) -> Mixed:
        """The scores, from the base's own and what the other streams' become."""
        if not has_rules and not self._lacking(active):
            return Mixed(
                self._plain_sum(base, hidden, control.coef, active, uniform_sum), base, control
            )
        base = base.float()
        steered = _steered(control.coef)
        if has_rules:
            steered |= (control.kind != 0) | _candidates(control)
        rows = torch.nonzero(steered)[:, 0]
        if not rows.numel():
            return Mixed(base, base, control)
        z = base.clone()
        critical = self._log_odds(hidden, control) if has_rules and self.heads else None
        self.watch.only(rows)
        z[rows] = self._mix_rows(
            base[rows],
            hidden[rows],
            _take(control, rows),
            active,
            has_rules,
            None if critical is None else critical[rows],
        )
        if self.layout.candidates:
            ids = control.ids.long().clamp(0, z.shape[-1] - 1)
            z.scatter_add_(-1, ids, control.added)
        return Mixed(z, base, control, critical)

    def _lacking(self, active: Sequence[bool]) -> bool:
        """Whether a stream that ran lacks a token of the base."""
        return any(v.lacking for v, ran in zip(self.vocabularies, active, strict=True) if ran)

    def alone(self, i: int, hidden: torch.Tensor, size: int) -> torch.Tensor:
        """[R, V] float32 scores of stream i by itself; −∞ on ids that are not in both tables.

        Args:
            i: the stream.
            hidden: [R, H_i] its hidden states.
            size: V, the size of the base's table.
        """
        own = self._unembed(i, hidden)
        assert own is not None
        return self._over_base(i, own, size)

    def choices(
        self, hidden: torch.Tensor, rows: Sequence[int], active: Sequence[bool], size: int
    ) -> dict[int, dict[int, tuple[int, float]]]:
        """What each stream by itself finds most likely next. Unembeds the rows once more.

        Every rank takes part (the gather inside is collective); ranks that hold no logits find
        nothing.

        Args:
            hidden: [R, width] rows of the steered model's hidden states.
            rows: which of them are asked for.
            active: [S] which streams ran in this step.
            size: V, the size of the base's table; any number on ranks that hold no logits.

        Returns:
            Row → companion stream that its sum reads → the id, and its log-probability.
        """
        found: dict[int, dict[int, tuple[int, float]]] = {row: {} for row in rows}
        used = self.layout.read_control(hidden).coef[list(rows)].ne(0).tolist()
        for i in range(1, self.layout.streams):
            readers = [row for row, uses in zip(rows, used, strict=True) if uses[i]]
            if not (readers and active[i] and self.unembed[i] is not None):
                continue
            own = self._unembed(i, hidden[readers][:, self.layout.columns(i)])
            if own is None:
                continue
            best = self._over_base(i, own, size).log_softmax(-1).max(-1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for row, pair in zip(readers, pairs, strict=True):
                found[row][i] = pair
        return found

    def _over_base(self, i: int, own: torch.Tensor, size: int) -> torch.Tensor:
        """[R, V] float32: the scores of stream i, −∞ on ids that are not in both tables."""
        out = torch.full((own.shape[0], size), NEVER, device=own.device)
        both = min(size, own.shape[-1])
        out[:, :both] = own[:, :both]
        for ids in (self.vocabularies[i].unshared, self.padded):
            if ids is not None:
                out[:, ids] = NEVER
        return out

    def _unembed(self, i: int, hidden: torch.Tensor) -> torch.Tensor | None:
        unembed = self.unembed[i]
        assert unembed is not None
        return unembed(hidden)

    def _log_odds(self, hidden: torch.Tensor, control: Control) -> torch.Tensor:
        """[R] float32: what each row's classifier head says; 0 where its rule reads none."""
        found = torch.zeros_like(control.kind)
        reads = torch.zeros_like(found, dtype=torch.bool)
        for kind in CRITICAL_KINDS:
            reads |= control.kind == float(kind)
        for h, reading in enumerate(self.heads):
            rows = torch.nonzero(reads & (control.head == h))[:, 0]
            if rows.numel():
                found[rows] = reading.head(hidden[rows, self.layout.columns(reading.stream)])
                self.watch.numbers(self.layout.streams + h, found[rows], rows)
        return found

    def _plain_sum(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        coef: torch.Tensor,
        active: Sequence[bool],
        uniform_sum: bool,
    ) -> torch.Tensor:
        """[R, V] float32 `Σ_i c_i s_i` of streams that lack no id: one pass over each's scores."""
        z = base.float()
        if (coef[:, 0] != 1).any():
            z = torch.where(coef[:, :1] == 0, 0.0, z * coef[:, :1])
        elif z is base:
            z = base.clone()
        for i in range(1, self.layout.streams):
            if not active[i]:
                continue
            rows, own = self._own_logits(i, hidden, coef, uniform_sum)
            own = own[:, : z.shape[-1]]
            if rows is None:
                # One pass, and float32 inside whatever the dtype of `own` is.
                part = z[:, : own.shape[-1]]
                torch.addcmul(part, own, coef[:, i : i + 1], out=part)
            else:
                z[rows, : own.shape[-1]] += own.float() * coef[rows, i : i + 1]
        if self.padded is not None:
            z[slice(None) if uniform_sum else torch.nonzero(_steered(coef)), self.padded] = NEVER
        return z

    def _mix_rows(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        control: Control,
        active: Sequence[bool],
        has_rules: bool,
        critical: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.padded is not None:
            base[:, self.padded] = NEVER
        logits: list[torch.Tensor | None] = [base]
        for i in range(1, self.layout.streams):
            logits.append(self._stream_logits(i, base, hidden, control) if active[i] else None)
        kind = control.kind if has_rules else None
        z = mix(
            logits,
            control.coef,
            kind,
            control.stream,
            control.param,
            self._lacking(active),
            critical,
            self.ends.of(control.ends),
        )
        if self.padded is not None:
            z[:, self.padded] = NEVER
        return z

    def _stream_logits(
        self, i: int, base: torch.Tensor, hidden: torch.Tensor, control: Control
    ) -> torch.Tensor:
        """[R, V] scores of stream i, on the rows that use it; −∞ on ids it does not share."""
        rows, own = self._own_logits(i, hidden, control.coef)
        out = own = own[:, : base.shape[-1]].float()
        if out.shape != base.shape:
            out = torch.full_like(base, NEVER)
            out[slice(None) if rows is None else rows, : own.shape[-1]] = own
        unshared = self.vocabularies[i].unshared
        if unshared is not None:
            out[:, unshared] = NEVER
        return out

    def _own_logits(
        self, i: int, hidden: torch.Tensor, coef: torch.Tensor, uniform_sum: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The rows that use stream i (None: all of them), and its [n, own V] scores there."""
        part = hidden[:, self.layout.columns(i)]
        if uniform_sum:
            own = self._unembed(i, part.contiguous())
            assert own is not None
            self.watch.scores(i, own)
            return None, own
        rows = torch.nonzero(coef[:, i])[:, 0]
        everywhere = rows.numel() == hidden.shape[0]
        if not rows.numel():  # gathering nothing from several ranks ends vLLM's CPU workers
            return rows, part.new_empty(0, 0)
        own = self._unembed(i, part.contiguous() if everywhere else part[rows])
        assert own is not None
        self.watch.scores(i, own, None if everywhere else rows)
        return None if everywhere else rows, own


def _steered(coef: torch.Tensor) -> torch.Tensor:
    """[R] bool: rows whose sum is not the base alone."""
    return (coef[:, 0] != 1) | (coef[:, 1:] != 0).any(-1)


def _candidates(control: Control) -> torch.Tensor:
    """[R] bool: rows that value streams add to."""
    return (control.ids != 0).any(-1) | (control.added != 0).any(-1)


def _take(control: Control, rows: torch.Tensor) -> Control:
    return Control(*(part[rows] for part in control))
