"""The read-out: hidden states of all streams → the steered model's scores.

Lives in the worker, called from `compute_logits`, before grammar mask, penalties and sampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from steering.kernels.layers import Contrast
from steering.kernels.mix import NEVER, Options, Rules, measure, mix, rows_where
from steering.plan import Gate, LayerKind, RuleKind
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import Control, Layout
from steering.worker.plan.step_plan import Classes
from steering.worker.readout import layers
from steering.worker.readout.candidates import only_candidates
from steering.worker.readout.parts import Mixed, Reading, Scores, Unembed, Vocabulary
from steering.worker.readout.watch import Watch

if TYPE_CHECKING:  # it imports vLLM, which the arithmetic here does not need
    from steering.worker.readout.one_product import OneProduct


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
        watch: looks at every stream's scores.
        one_product: for rows that all sum the same streams; None if there is none.
        taps: indices of the taps, those with the same unembedding together.
    """

    layout: Layout
    unembed: Sequence[Unembed | None]
    vocabularies: Sequence[Vocabulary]
    padded: torch.Tensor | None
    heads: Sequence[Reading] = ()
    ends: EndSets = field(default_factory=lambda: EndSets((), 0))
    watch: Watch = field(default_factory=lambda: Watch(()))
    one_product: OneProduct | None = None
    taps: Sequence[Sequence[int]] = ()

    def __call__(
        self,
        hidden: torch.Tensor,
        classes: Classes,
        reported: torch.Tensor | None = None,
        apart: Mapping[int, torch.Tensor] = MappingProxyType({}),
    ) -> Mixed | None:
        """Scores of R rows.

        Nothing here waits for a device: on a GPU every stream that runs is unembedded on all rows,
        and the control says on the device which of them count.

        Args:
            hidden: [R, width] rows of the steered model's hidden states.
            classes: what occurs among the rows. A stream that did not run is not in any sum.
            reported: [n] int64 rows to measure; None: none.
            apart: companions that ran, and the [m] int64 rows on which their own scores are
                wanted, in a sum or not. All ranks name the same, and the host knows how many.

        Returns:
            The scores with what they were made of, or None on ranks that hold no logits.
        """
        control = self.layout.read_control(hidden)
        ran = [a and u is not None for a, u in zip(classes.active, self.unembed, strict=True)]
        base = self._unembed(0, hidden[:, self.layout.columns(0)].contiguous())
        if base is not None:
            self.watch.scores(0, base)
        uses = control.coef != 0
        # The gather inside is collective: every rank takes part, with the same rows.
        streams: list[Scores | None] = [None] * self.layout.streams
        for group in self._groups():
            for i, scores in self._scores([i for i in group if ran[i]], hidden, uses):
                streams[i] = scores
        own = {i: self._apart(i, hidden, rows) for i, rows in apart.items()}
        if base is None:
            return None
        critical = self._log_odds(hidden, control, classes) if classes.heads else None
        plain = Mixed(base, base, streams, critical, apart=own)
        if classes.layers:
            mixed = self._layered(plain, control, classes, reported)
        else:
            mixed = self._mixed(plain, control, classes, reported)
        if classes.masked:
            mixed = mixed._replace(z=only_candidates(mixed.z, control))
            mixed = layers.measured_again(mixed, reported)
        return mixed

    def _groups(self) -> list[Sequence[int]]:
        """The companions, those together that are read out by one product."""
        tapped = {i for group in self.taps for i in group}
        alone = [i for i in range(1, self.layout.streams) if i not in tapped]
        return [*([i] for i in alone), *self.taps]

    def _apart(self, i: int, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[m, own V] the scores of stream i on some rows; empty on ranks that hold no logits."""
        own = self._unembed(i, hidden[rows, self.layout.columns(i)])
        if own is None:
            return hidden.new_empty(0, 0)
        self.watch.scores(i, own, rows)
        return own

    def base(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[R, V] the base's scores of a step in which it runs alone, from its [R, H_0]."""
        scores = self._unembed(0, hidden)
        if scores is not None:
            self.watch.scores(0, scores)
        return scores

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
        self.watch.numbers([i for i, ran in enumerate(active) if ran], z.amax(-1))
        self.watch.suspects = lambda rows: self._at_fault(hidden[rows])
        z = z.float()
        if self.padded is not None:
            z.index_fill_(1, self.padded, NEVER)
        return z

    def _at_fault(self, hidden: torch.Tensor) -> int:
        """The bits of the streams whose own scores on some rows are no numbers: made anew.

        For a host that may wait, after `in_one`.
        """
        coef, flag = self.layout.read_coef(hidden), 0
        for i, summed in enumerate(coef.ne(0).any(0).tolist()):
            if summed:
                own = self._unembed(i, hidden[:, self.layout.columns(i)].contiguous())
                assert own is not None
                flag |= int(not own.amax(-1).isfinite().all()) << i
        return flag

    def _layered(
        self, plain: Mixed, control: Control, classes: Classes, reported: torch.Tensor | None
    ) -> Mixed:
        """The scores of a step in which rules over layers occur."""
        found, evolves = None, LayerKind.EVOLVE in classes.layers
        summed = layers.base_alone(control) if evolves else control
        if classes.layers - {LayerKind.EVOLVE}:
            found = self._contrasted(plain, summed)
            summed = summed._replace(coef=found.coef)
        mixed = self._mixed(plain, summed, classes, reported)
        if found is not None:
            mixed = layers.shifted(mixed, found.shift, reported)
        if evolves:
            mixed = mixed._replace(z=layers.evolve(self, plain, control, mixed.z))
            mixed = layers.measured_again(mixed, reported)
        return mixed

    def _contrasted(self, plain: Mixed, control: Control) -> Contrast:
        """The coefficients of all rows once taps were chosen, and the shifts of their scores."""
        return layers.contrasted(self, plain, control)

    def _mixed(
        self, plain: Mixed, control: Control, classes: Classes, reported: torch.Tensor | None
    ) -> Mixed:
        """The scores, from what the streams have of their own (`plain.z` is the base's)."""
        if classes.has_rules or self._lacking(classes.active):
            z = self._ruled(plain, control, classes)
        else:
            z = self._plain_sum(plain, control.coef)
        if reported is None:
            return plain._replace(z=z)
        measures = measure(z[reported], plain.base[reported].float())
        return plain._replace(z=z, measures=measures)

    def _ruled(self, plain: Mixed, control: Control, classes: Classes) -> torch.Tensor:
        """[R, V] float32 scores, where rows have rules or streams lack ids of the base."""
        base = plain.base.float()
        steered = _steered(control)
        rows = rows_where(steered)
        if rows is None:
            z = torch.where(steered[:, None], self._mix_rows(plain, control, classes, None), base)
        else:
            z = base.clone()
            if rows.numel():
                z[rows] = self._mix_rows(plain, _take(control, rows), classes, rows)
        if classes.valued:
            ids = control.ids.long().clamp(0, z.shape[-1] - 1)
            z.scatter_add_(-1, ids, control.added)
        return z

    def rows_where(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Rows to which some work is limited; None: all are computed, and the mask selects."""
        return rows_where(mask)

    def _lacking(self, active: Sequence[bool]) -> bool:
        """Whether a stream that ran lacks a token of the base."""
        return any(v.lacking for v, ran in zip(self.vocabularies, active, strict=True) if ran)

    def draft_scores(self, i: int, hidden: torch.Tensor, size: int) -> torch.Tensor:
        """[R, V] float32 scores of stream i by itself; −∞ on ids that are not in both tables.

        Args:
            i: the stream.
            hidden: [R, H_i] its hidden states.
            size: V, the size of the base's table.
        """
        own = self._unembed(i, hidden)
        assert own is not None
        return self.over_base(i, own, size)

    def alone(self, i: int, mixed: Mixed, rows: torch.Tensor) -> torch.Tensor:
        """The same on [m] int64 rows that were read out and sum companion i, [m, V]."""
        scores = mixed.streams[i]
        assert scores is not None
        return self.over_base(i, scores.of(rows), mixed.z.shape[-1])

    def over_base(self, i: int, own: torch.Tensor, size: int) -> torch.Tensor:
        """[R, V] float32: the scores of stream i, −∞ on ids that are not in both tables."""
        out = torch.full((own.shape[0], size), NEVER, device=own.device)
        both = min(size, own.shape[-1])
        out[:, :both] = own[:, :both]
        for ids in (self.vocabularies[i].unshared, self.padded):
            if ids is not None:
                out.index_fill_(1, ids, NEVER)
        return out

    def _unembed(self, i: int, hidden: torch.Tensor) -> torch.Tensor | None:
        unembed = self.unembed[i]
        assert unembed is not None
        return unembed(hidden)

    def _scores(
        self, streams: Sequence[int], hidden: torch.Tensor, uses: torch.Tensor
    ) -> Iterator[tuple[int, Scores]]:
        """What streams with one unembedding have of their own, by one product.

        Args:
            streams: their indices.
            hidden: [R, width].
            uses: [R, S] bool, which rows sum which. Others may be left out.

        Returns:
            (stream, its scores); nothing on ranks that hold no logits.
        """
        every = {i: self.rows_where(uses[:, i]) for i in streams}
        wanted, parts = [], []
        for i, rows in every.items():
            part = hidden[:, self.layout.columns(i)]
            if rows is not None and not rows.numel():
                # Gathering nothing from several ranks ends vLLM's CPU workers.
                yield i, Scores(rows, part.new_empty(0, 0))
                continue
            whole = rows is None or rows.numel() == hidden.shape[0]
            wanted.append((i, None if whole else rows, uses[:, i] if rows is None else None))
            parts.append(part.contiguous() if whole else part[rows])
        if not wanted:
            return
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        scores = self._unembed(wanted[0][0], together)
        if scores is None:
            return
        split = scores.split([len(part) for part in parts])
        for (i, rows, counted), own in zip(wanted, split, strict=True):
            self.watch.scores(i, own, rows, counted)
            yield i, Scores(rows, own)

    def _log_odds(self, hidden: torch.Tensor, control: Control, classes: Classes) -> torch.Tensor:
        """[R] float32: the number of each row's classifier head; 0 where its rule reads none."""
        odds = torch.zeros_like(control.kind)
        reads = Options.of(control.options).gate[:, 0] == Gate.HEAD
        reads &= control.kind == float(RuleKind.SELECT)
        for h in classes.heads:
            own, (stream, head) = reads & (control.head == h), self.heads[h]
            rows = self.rows_where(own)
            if rows is None:
                numbers = head(hidden[:, self.layout.columns(stream)])
                odds = torch.where(own, numbers, odds)
                self.watch.numbers([self.layout.streams + h], numbers, None, own)
            elif rows.numel():
                odds[rows] = numbers = head(hidden[rows, self.layout.columns(stream)])
                self.watch.numbers([self.layout.streams + h], numbers, rows)
        return odds

    def _plain_sum(self, plain: Mixed, coef: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 `Σ_i c_i s_i` of streams that lack no id: one pass over each's scores."""
        z, c = plain.base.float(), coef[:, :1]
        if z.device.type != "cpu" or (c != 1).any():
            z = torch.where(c == 0, 0.0, z * c)
        elif z is plain.base:
            z = z.clone()
        for i, scores in enumerate(plain.streams):
            if scores is None:
                continue
            rows, own = scores.rows, scores.own[:, : z.shape[-1]]
            part, c = z[:, : own.shape[-1]], coef[:, i : i + 1]
            if rows is not None:
                part[rows] += own.float() * c[rows]
            elif z.device.type == "cpu":
                # One pass, and float32 inside whatever the dtype of `own` is.
                torch.addcmul(part, own, c, out=part)
            else:
                part += torch.where(c == 0, 0.0, own * c)
        if self.padded is not None:
            lost = z.index_select(1, self.padded).masked_fill_(_summing(coef)[:, None], NEVER)
            z.index_copy_(1, self.padded, lost)
        return z

    def _mix_rows(
        self, plain: Mixed, control: Control, classes: Classes, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """[n, V] the scores of the steered rows; None: of all, as if all were steered.

        Args:
            plain: what the streams have of their own, R rows.
            control: of the n rows.
            classes: what occurs among them.
            rows: [n] int64 which of the R.
        """
        base = (plain.base if rows is None else plain.base[rows]).float()
        if self.padded is not None:
            base = base.clone() if base is plain.base else base
            base.index_fill_(1, self.padded, NEVER)
        logits: list[torch.Tensor | None] = [base]
        for i, scores in enumerate(plain.streams[1:], 1):
            logits.append(None if scores is None else self.on_rows(i, scores, base, rows))
        odds = plain.critical
        odds = odds if odds is None or rows is None else odds[rows]
        rules = self._rules(control, classes, odds) if classes.rules else None
        z = mix(logits, control.coef, rules, self._lacking(classes.active))
        return z if self.padded is None else z.index_fill_(1, self.padded, NEVER)

    def _rules(self, control: Control, classes: Classes, odds: torch.Tensor | None) -> Rules:
        """The rules of the rows of `control`."""
        return Rules(
            control.kind,
            control.stream,
            control.param,
            control.counts,
            control.options,
            odds,
            self.ends.of(control.ends),
            classes.rules,
            classes.searched,
            classes.shared,
        )

    def on_rows(
        self,
        i: int,
        scores: Scores,
        base: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """[n, V] scores of stream i on some rows; −∞ on ids it lacks, anything where unused."""
        own = scores.own
        if scores.rows is None and rows is not None and rows.numel() < own.shape[0]:
            own = own[rows]
        own = self._widened(i, own, base)
        if scores.rows is None or (rows is not None and torch.equal(scores.rows, rows)):
            return own
        out = torch.full_like(base, NEVER)
        wanted = torch.arange(len(out)) if rows is None else rows
        here = torch.isin(wanted, scores.rows)
        out[here] = own[torch.searchsorted(scores.rows, wanted[here])]
        return out

    def _widened(self, i: int, own: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """[n, V] float32 over the base's ids; −∞ on those that stream i does not share."""
        own = own[:, : base.shape[-1]].float()
        if own.shape[-1] < base.shape[-1]:
            own = torch.nn.functional.pad(own, (0, base.shape[-1] - own.shape[-1]), value=NEVER)
        unshared = self.vocabularies[i].unshared
        return own if unshared is None else own.index_fill_(1, unshared, NEVER)


def _summing(coef: torch.Tensor) -> torch.Tensor:
    """[R] bool: rows whose sum is not the base alone."""
    return (coef[:, 0] != 1) | (coef[:, 1:] != 0).any(-1)


def _steered(control: Control) -> torch.Tensor:
    """[R] bool: rows that are not the base alone; value streams add to some."""
    added = (control.ids != 0).any(-1) | (control.added != 0).any(-1)
    return _summing(control.coef) | (control.kind != 0) | added


def _take(control: Control, rows: torch.Tensor) -> Control:
    return Control(*(part[rows] for part in control))
