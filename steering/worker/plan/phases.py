"""Phases in the worker: the control of each of a request's phases, and which tokens have which.

A token's phase depends on its place in the reply and on the reply's tokens in front of it: both are
looked at anew in each step, so nothing is kept that a rejected draft or a preemption could make
wrong. Where the newest tokens are on the device only, nothing waits for them: a table of the
tokens so far is searched there.

Letters: Q requests of this step, T tokens, P phases of the request that has most, N lines of
control (one per request, then one per phase), X texts, m requests whose phases texts bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from steering.worker.plan.batches import Bool, Int32, Int64, Schedule

FAR = 2**30
"""A token that no reply has."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PhaseLine:
    """One phase of a request.

    Args:
        control: [S + EXTRA] float32.
        start: the first of the reply's tokens that it may hold for.
        stop: the first one behind them.
        after: the text behind which it holds; () for none.
        until: the text up to whose end it holds; () for none.
    """

    control: npt.NDArray[np.float32]
    start: int
    stop: int
    after: Ids = ()
    until: Ids = ()


@dataclass(frozen=True, slots=True)
class PhaseTables:
    """The phases of a step's requests.

    Args:
        lines: [N, S + EXTRA] float32.
        first: [Q] int32 where a request's phases begin in `lines`.
        rows: [N] the request of each line.
        bounds: [4, Q, P] int32: start, stop; index of the text that bounds it from below, and from
            above, −1 for none. A phase that is not there starts at `FAR`.
        prompts: [Q] int32 tokens in front of each reply.
        texts: X.
        watched: [m] requests.
    """

    lines: npt.NDArray[np.float32]
    first: Int32
    rows: Int64
    bounds: Int32
    prompts: Int32
    texts: tuple[Ids, ...]
    watched: Int64

    @classmethod
    def of(
        cls,
        control: npt.NDArray[np.float32],
        phases: Sequence[Sequence[PhaseLine]],
        prompts: Sequence[int],
        ends: int,
    ) -> Self | None:
        """Those of Q requests; None if none has phases.

        Args:
            control: [Q, S + EXTRA] of the requests, where no phase holds.
            phases: of each.
            prompts: tokens in front of each reply.
            ends: the column that a request's phases have as the request has it.
        """
        most = max(map(len, phases))
        if not most:
            return None
        lines, first, texts = [*control], [], dict[Ids, int]()
        rows = [*range(len(phases))]
        bounds = np.full((4, len(phases), most), -1, np.int32)
        bounds[:2] = FAR
        for q, own in enumerate(phases):
            first.append(len(lines))
            for j, phase in enumerate(own):
                line = phase.control.copy()
                line[ends] = control[q, ends]
                lines.append(line)
                rows.append(q)
                bounds[:2, q, j] = phase.start, phase.stop
                for side, text in ((2, phase.after), (3, phase.until)):
                    if text:
                        bounds[side, q, j] = texts.setdefault(text, len(texts))
        watched = np.flatnonzero((bounds[2:] >= 0).any((0, 2)))
        return cls(
            np.stack(lines),
            np.array(first, np.int32),
            np.array(rows, np.int64),
            bounds,
            np.array(prompts, np.int32),
            tuple(texts),
            watched,
        )

    def may_hold(self, schedule: Schedule) -> Bool:
        """[N] lines: all that hold for a token of the step, or more."""
        newest = (schedule.computed + schedule.lengths - self.prompts)[:, None]
        begins = (schedule.computed + 1 - self.prompts)[:, None]
        oldest = begins if schedule.exact else np.minimum(begins, 0)
        start, stop, after, until = self.bounds
        inside = (start <= newest) & (stop > oldest)
        # What holds for all tokens of the step leaves nothing to what stands before it.
        whole = (start <= oldest) & (stop > newest) & (after < 0) & (until < 0)
        kept = np.ones(len(self.lines), np.bool_)
        for q, j in np.argwhere((start < FAR) & ~inside):
            kept[self.first[q] + j] = False
        for q, j in np.argwhere(whole):
            kept[[q, *range(self.first[q], self.first[q] + j)]] = False
        return kept


@dataclass(frozen=True)
class Replies:
    """The tokens of some requests on the device, where the newest ones are known there only.

    Args:
        table: [·, context] int32 tokens of the runner's slots; behind the newest, anything.
        slots: [m] the slot of each request.
    """

    table: torch.Tensor
    slots: Int64


@dataclass(frozen=True)
class PhasedStep:
    """The control of one step, some of whose requests have phases.

    Args:
        tables: of its requests.
        schedule: of the step.
        replies: the watched requests' tokens: [m] arrays on the host, of this step's too; or where
            the device has them. None if nothing is watched.
    """

    tables: PhaseTables
    schedule: Schedule
    replies: Sequence[Int32] | Replies | None

    def arrays(self) -> list[npt.NDArray[Any]]:
        """The lines of control, and what `line` reads on the device."""
        tables, schedule = self.tables, self.schedule
        rows = np.repeat(np.arange(len(schedule.lengths)), schedule.lengths)
        found = [tables.lines, rows, tables.first, tables.bounds, tables.prompts]
        if isinstance(self.replies, Replies):
            inside = np.isin(rows, tables.watched)
            which = np.searchsorted(tables.watched, rows[inside])
            return [*found, self.replies.slots, tables.watched, np.flatnonzero(inside), which]
        seen = np.full((len(schedule.lengths), max(len(tables.texts), 1)), FAR, np.int32)
        for row, ids in zip(tables.watched, self.replies or (), strict=True):
            tokens, prompt = torch.from_numpy(ids)[None], torch.tensor([int(tables.prompts[row])])
            seen[row] = [int(behind(tokens, prompt, text)) for text in tables.texts]
        return [*found, seen]

    def line(
        self, there: Sequence[torch.Tensor], input_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """[T] int64 on the device: which line of control each token has.

        Args:
            there: `arrays`.
            input_ids: [≥ T] of the step.
            positions: [≥ T] of its tokens in their requests.
        """
        _, rows, first, bounds, prompts, *rest = there
        if isinstance(self.replies, Replies):
            seen = self._search(rest, input_ids, positions, prompts)
        else:
            (seen,) = rest
        start, stop = _between(bounds, seen)
        n = positions[: rows.shape[0]] + 1 - prompts[rows]
        line = rows.clone()
        for j in range(bounds.shape[2]):
            inside = (n >= start[rows, j]) & (n < stop[rows, j])
            line = torch.where(inside, first[rows] + j, line)
        return line

    def _search(
        self,
        rest: Sequence[torch.Tensor],
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        prompts: torch.Tensor,
    ) -> torch.Tensor:
        """[Q, X] behind which of the reply's tokens each text is there."""
        slots, watched, at, which = rest
        assert isinstance(self.replies, Replies)
        ends = (self.schedule.computed + self.schedule.lengths)[self.tables.watched]
        ids = self.replies.table[:, : int(ends.max())][slots]
        # Drafts are nowhere but in the step; what it reads is what the table has otherwise.
        ids[which, positions[at].long()] = input_ids[at].to(ids.dtype)
        found = [behind(ids, prompts[watched], text) for text in self.tables.texts]
        seen = ids.new_full((len(self.schedule.lengths), len(found)), FAR)
        seen[watched] = torch.stack(found, 1).to(seen.dtype)
        return seen


def behind(ids: torch.Tensor, prompts: torch.Tensor, text: Ids) -> torch.Tensor:
    """[m] int64: behind which of a reply's tokens a text is first there; `FAR` if it is not.

    Args:
        ids: [m, L] prompts and replies.
        prompts: [m] tokens of the prompts.
        text: D ids.
    """
    count = ids.shape[1] - len(text) + 1
    if count <= 0:
        return torch.full_like(prompts, FAR, dtype=torch.int64)
    at = torch.arange(count, device=ids.device)
    there = at >= prompts[:, None]
    for d, token in enumerate(text):
        there &= ids[:, d : d + count] == token
    first = torch.where(there, at, FAR).amin(1)
    return torch.where(first < FAR, first + len(text) - prompts, FAR)


def _between(bounds: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[Q, P] each: the first token that a phase holds for, and the first one behind."""
    start, stop, after, until = bounds.unbind(0)
    found = [seen.gather(1, text.clamp(min=0).long()) for text in (after, until)]
    start = torch.where(after >= 0, torch.maximum(start, found[0]), start)
    return start, torch.where(until >= 0, torch.minimum(stop, found[1]), stop)
