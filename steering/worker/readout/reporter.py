"""Measures the rows of a step whose drawn tokens are reported.

`measure` follows the read-out and `sampled` the sampler, both on the device. One copy then goes to
the host, which nobody waits for: it is taken in when it has arrived, or when a report is fetched.

Lives in the worker; one instance per steered model. Letters: n reported rows, m of them of requests
whose report has every token, V the base's vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch

from steering.plan import BASE
from steering.worker.adapting.groups import Routed
from steering.worker.plan.batches import Int64
from steering.worker.plan.layout import Layout
from steering.worker.plan.request_state import BatchTables, RequestState
from steering.worker.plan.staging import HostCopy
from steering.worker.plan.step_plan import StepPlan
from steering.worker.readout.parts import Mixed, Reading
from steering.worker.readout.readout import Readout
from steering.worker.readout.report import ReportBook, StepRecord, Tally, choice_of
from steering.worker.readout.rows import DrawRows
from steering.worker.readout.watch import Watch

Path = tuple[str, ...]
"""Where a number belongs in the entry of a token."""

Columns = dict[Path, tuple[Int64, torch.Tensor]]
"""What was measured: which of the n rows have it, and their numbers or ids."""


@dataclass(frozen=True)
class StepReport:
    """The reports of a step, as the host knows them before it is read out.

    Args:
        states: of the requests that report and draw.
        ran: of each, the streams that ran for it, once for each pass.
        ids: of these requests, as vLLM has them.
        counts: how many rows of scores each has.
        rows: [n] these rows.
        requests: [n] the request of each, and
        nth: [n] which of its drawn tokens it is for.
        detail: which of the n rows are of reports that have every token.
        critical: which have a rule that reads a classifier head.
        heads: which report the number of a head, by its name.
        choices: which of `detail` sum a companion, by its index.
        likelihoods: which report a stream's log-probability of the drawn token, by its index.
        apart: those of these streams that not all of their rows sum; not the base.
    """

    states: tuple[RequestState, ...]
    ran: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]
    counts: Int64
    rows: Int64
    requests: Int64
    nth: Int64
    detail: Int64
    critical: Int64
    heads: dict[str, Int64]
    choices: dict[int, Int64]
    likelihoods: dict[int, Int64]
    apart: tuple[int, ...]

    @classmethod
    def of(
        cls, plan: StepPlan, drawing: DrawRows, scored: Sequence[bool], names: Sequence[str]
    ) -> StepReport | None:
        """The reports of a step; None if it has none.

        Args:
            plan: of the step.
            drawing: its rows.
            scored: [S] which streams have scores.
            names: of the streams that run, base first.
        """
        pairs = [(q, state) for q, state in plan.tables.reported if plan.schedule.draws[q]]
        if not pairs:
            return None
        own = np.array([q for q, _ in pairs], np.int64)
        states = tuple(state for _, state in pairs)
        counts = np.diff(drawing.starts)[own]
        rows, requests = drawing.rows(own), np.repeat(own, counts)

        def where(of_request: Iterable[bool]) -> Int64:
            return np.flatnonzero(np.repeat(np.fromiter(of_request, np.bool_), counts))

        heads = sorted({name for state in states for name in state.heads})
        detail = where(state.tokens for state in states)
        streams = [i for i, has in enumerate(scored) if i and has and plan.classes.active[i]]
        used = {i: where(s.alone(i) for s in states) for i in streams}
        read = sorted({i for state in states for i in state.likelihoods})
        apart = (
            i for i in read if i and any(i in s.likelihoods and not s.control[i] for s in states)
        )
        return cls(
            states,
            tuple(plan.ran(q, names) for q, _ in pairs),
            tuple(plan.schedule.request_ids[q] for q in own),
            counts,
            rows,
            requests,
            rows - drawing.starts[requests],
            detail,
            where(state.gated is not None for state in states),
            {name: where(name in state.heads for state in states) for name in heads},
            {i: which for i, which in used.items() if which.size},
            {i: where(i in state.likelihoods for state in states) for i in read},
            tuple(apart),
        )

    def arrays(self) -> list[Int64]:
        """What the device needs of it, for `StagedReport.of`."""
        some = [self.critical, *self.heads.values(), *self.choices.values()]
        every = [self.rows, self.requests, self.nth, self.detail, self.rows[self.detail]]
        every += [self.rows[which] for which in [*some, *self.likelihoods.values()]]
        return [*every, *self.likelihoods.values()]


@dataclass(frozen=True)
class StagedReport:
    """A step's reports, and on the device the rows (int64) of each part; fields as there.

    `which` are those of `likelihoods` as numbers of the n rows.
    """

    host: StepReport
    rows: torch.Tensor
    requests: torch.Tensor
    nth: torch.Tensor
    detail: torch.Tensor
    detail_rows: torch.Tensor
    critical: torch.Tensor
    heads: dict[str, torch.Tensor]
    choices: dict[int, torch.Tensor]
    likelihoods: dict[int, torch.Tensor]
    which: dict[int, torch.Tensor]

    @classmethod
    def of(cls, host: StepReport, arrays: Sequence[torch.Tensor]) -> StagedReport:
        """From the arrays of `StepReport.arrays` on the device."""
        rows, requests, nth, detail, detail_rows, critical, *rest = arrays
        some = iter(rest)
        heads = {name: next(some) for name in host.heads}
        choices = {i: next(some) for i in host.choices}
        likelihoods = {i: next(some) for i in host.likelihoods}
        which = {i: next(some) for i in host.likelihoods}
        return cls(
            host, rows, requests, nth, detail, detail_rows, critical, heads, choices, likelihoods,
            which,
        )  # fmt: skip

    @property
    def apart(self) -> dict[int, torch.Tensor]:
        """What `Readout` is asked for beside its sum."""
        return {i: self.likelihoods[i] for i in self.host.apart}


@dataclass
class _Measured:
    """A step whose tokens are not drawn yet; [m, V] scores, also of `StepReport.likelihoods`."""

    report: StagedReport
    columns: Columns
    masses: tuple[torch.Tensor, torch.Tensor]
    scores: tuple[torch.Tensor, torch.Tensor]
    likelihoods: dict[int, torch.Tensor]


@dataclass
class _Sent:
    """A step on its way to the host."""

    report: StepReport
    records: list[StepRecord]
    columns: list[tuple[Path, Int64]]
    copy: HostCopy

    def fill(self) -> None:
        """Writes what has reached the host into the records of the step."""
        _fill(self)


@dataclass
class _SentRoutes:
    """A step's routes on their way to the host.

    Args:
        counts: (whose they are, the step that draws next, stream, digest, where they lie).
        copy: of the counts.
    """

    counts: list[tuple[Tally, int, str, str, slice]]
    copy: HostCopy

    def fill(self) -> None:
        """Adds what has reached the host to the tallies."""
        numbers = self.copy.read().numpy()
        for tally, step, stream, digest, where in self.counts:
            tally.routes.append((step, stream, digest, numbers[where].tolist()))


@dataclass
class Reporter:
    """Fills the reports of requests that ask for one.

    Args:
        names: of the streams, base first; taps, which run nothing, are the last.
        layout: of the hidden states.
        readings: heads by name, and what they read.
        watch: looks at every head's number.
        taps: how many there are.
    """

    names: tuple[str, ...]
    layout: Layout
    readings: dict[str, Reading]
    watch: Watch
    taps: int = 0
    book: ReportBook = field(default_factory=ReportBook)
    _measured: _Measured | None = None
    _sent: deque[_Sent | _SentRoutes] = field(default_factory=deque)

    @property
    def running(self) -> tuple[str, ...]:
        """The streams that run, base first."""
        return self.names[: len(self.names) - self.taps]

    def routes(self, ids: Sequence[str], tables: BatchTables, routed: Sequence[Routed]) -> None:
        """Sends where the tokens of a step were routed to the host.

        Args:
            ids: [Q] of the step's requests.
            tables: of them.
            routed: what was counted; changed by nobody afterwards.
        """
        found, start = [], 0
        for stream, digest, counts in routed:
            members = counts.shape[1]
            for row, state in tables.reported:
                if any(u.stream == stream and u.digest == digest for u in state.adapters):
                    tally, first = self.book.tally(state.tag, choice_of(ids[row])), start
                    first += row * members
                    where = slice(first, first + members)
                    found.append((tally, len(tally.steps), stream, digest, where))
            start += counts.numel()
        if found:
            every = torch.cat([counts.flatten() for _, _, counts in routed])
            self._sent.append(_SentRoutes(found, HostCopy(every)))
            self.take_in()

    def measure(
        self, report: StagedReport, mixed: Mixed, hidden: torch.Tensor, readout: Readout
    ) -> None:
        """Measures the reported rows, where there are scores.

        Args:
            report: of the step.
            mixed: R rows of scores, with measures of the reported ones.
            hidden: [R, width] what they were made of.
            readout: what made them.
        """
        assert mixed.measures is not None
        host, measures = report.host, mixed.measures
        every = np.arange(host.rows.size)
        columns: Columns = {
            ("kl",): (every, measures.kl),
            ("choice",): (every, measures.choice),
            ("base_choice",): (every, measures.base_choice),
        }
        if host.critical.size and mixed.critical is not None:
            probability = mixed.critical[report.critical].sigmoid()
            columns["critical_probability",] = host.critical, probability
        for name, rows in report.heads.items():
            stream, head = self.readings[name]
            numbers = head(hidden[rows, self.layout.columns(stream)])
            self.watch.numbers([self.watch.names.index(name)], numbers, rows)
            columns["heads", name] = host.heads[name], numbers
        for i, rows in report.choices.items():
            best = readout.alone(i, mixed, rows).log_softmax(-1).max(-1)
            columns["choices", self.names[i], "id"] = host.choices[i], best.indices
            columns["choices", self.names[i], "logprob"] = host.choices[i], best.values
        some, rows = report.detail, report.detail_rows
        scores = mixed.z[rows], mixed.base[rows].float()
        masses = measures.mass[some], measures.base_mass[some]
        if host.detail.size:
            best_of_base = measures.base_choice[some]
            columns["choices", BASE, "logprob"] = (
                host.detail,
                _log_probability(scores[1], masses[1], best_of_base),
            )
        read = {i: self._own(i, report, mixed, readout) for i in host.likelihoods}
        self._measured = _Measured(report, columns, masses, scores, read)

    @staticmethod
    def _own(i: int, report: StagedReport, mixed: Mixed, readout: Readout) -> torch.Tensor:
        """[m, V] a copy of the scores of stream i on the rows that report its log-probability."""
        if not i:
            return mixed.base[report.likelihoods[i]].float()
        if i in mixed.apart:
            return readout.over_base(i, mixed.apart[i], mixed.z.shape[-1])
        return readout.alone(i, mixed, report.likelihoods[i])

    def sampled(self, ids: torch.Tensor) -> None:
        """Sends the step's measures to the host, with its tokens.

        Args:
            ids: [Q, ≥ K + 1] what the step drew; negative where it drew nothing.
        """
        measured, self._measured = self._measured, None
        if measured is None:
            return
        report, columns = measured.report, measured.columns
        host = report.host
        drawn = ids[report.requests, report.nth]
        columns["token_id",] = np.arange(host.rows.size), drawn
        if host.detail.size:
            tokens = drawn[report.detail].clamp(0)
            for path, s, m in zip(_LOGPROBS, measured.scores, measured.masses, strict=True):
                columns[path] = host.detail, _log_probability(s, m, tokens)
        for i, s in measured.likelihoods.items():
            found = _log_probability(s, s.logsumexp(-1), drawn[report.which[i]].clamp(0))
            columns["likelihoods", self.names[i]] = host.likelihoods[i], found
        records = []
        for i, (state, count) in enumerate(zip(host.states, host.counts, strict=True)):
            tally = self.book.tally(state.tag, choice_of(host.ids[i]))
            tally.detailed = state.tokens
            records.append(tally.begin(host.ran[i], int(count) - 1))
        every = torch.cat([numbers.double() for _, numbers in columns.values()])
        paths = [(path, which) for path, (which, _) in columns.items()]
        self._sent.append(_Sent(host, records, paths, HostCopy(every)))
        self.take_in()

    def take_in(self, wait: bool = False) -> None:
        """Takes in the steps that have reached the host, or all."""
        while self._sent and (wait or self._sent[0].copy.ready):
            self._sent.popleft().fill()

    def take(self, tag: str, tokens: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """See `ReportBook.take`."""
        self.take_in(wait=True)
        return self.book.take(tag, tokens)


_LOGPROBS: tuple[Path, Path] = ("steered_logprob",), ("base_logprob",)


def _log_probability(scores: torch.Tensor, mass: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[m] of one id of each of [m, V] scores, whose log Σ exp is `mass`."""
    return scores.gather(1, ids.long()[:, None])[:, 0] - mass


def _fill(sent: _Sent) -> None:
    numbers, start = sent.copy.read().numpy(), 0
    measured: list[dict[str, Any]] = [{} for _ in sent.report.rows]
    for path, which in sent.columns:
        for row, number in zip(which, numbers[start : start + which.size].tolist(), strict=True):
            inner = measured[row]
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = number
        start += which.size
    rows = iter(measured)
    host = sent.report
    for state, record, count in zip(host.states, sent.records, host.counts, strict=True):
        drawn = takewhile(lambda row: row["token_id"] >= 0, list(islice(rows, count)))
        record.entries = [_entry(state, row) for row in drawn]


def _entry(state: RequestState, row: dict[str, Any]) -> dict[str, Any]:
    """What a report has of one token."""
    entry: dict[str, Any] = {"kl": row["kl"], "base_choice": int(row["base_choice"])}
    entry["changed"] = row["choice"] != row["base_choice"]
    if (probability := row.get("critical_probability")) is not None:
        entry["critical_probability"] = probability
        if state.gated is not None and state.gated[0]:
            entry["critical"] = probability > state.gated[1]
    for part in ("heads", "likelihoods"):
        if part in row:
            entry[part] = row[part]
    if state.tokens:
        entry["token_id"] = int(row["token_id"])
        entry |= {name: row[name] for name in ("base_logprob", "steered_logprob")}
        row["choices"][BASE]["id"] = row["base_choice"]
        # The base first, as people read it.
        names = [BASE, *(name for name in row["choices"] if name != BASE)]
        best = {name: row["choices"][name] for name in names}
        entry["choices"] = {name: (int(one["id"]), one["logprob"]) for name, one in best.items()}
    return entry
