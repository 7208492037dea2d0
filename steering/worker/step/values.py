"""Value streams: V of each of the base's most likely next tokens, as if it had been drawn.

A candidate is one more token behind the value stream's prefix. All candidates of a step run as one
batch of one-token rows. Each row reads the prefix from the request's own KV blocks but for the
last, which is replaced by a *scratch* block behind the blocks that vLLM manages: a copy of the
request's last, not yet full block, into which the candidate's KV is written. So nothing of a
candidate remains, and the cost is one row per candidate. Lives in the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steering.kernels.mix import NEVER, Ends
from steering.kernels.values import TRANSFORMS, value_offsets
from steering.plan import Values
from steering.worker.plan.batches import Bool, Candidates, Int32, Int64, Schedule
from steering.worker.plan.step_plan import Valued

Run = Callable[[int, torch.Tensor, Candidates], torch.Tensor]
"""(stream, [m] token ids, where they run) → [m, H] hidden states."""

Note = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(stream, [m] numbers, [m] int64 rows of the step): one that is NaN or infinite is a fault."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""[m, H] hidden states → [m] float32."""


OF_ALL = 7
"""Arrays of a `ValuePlan` that are of all streams; each of its parts has four more."""

NOTHING = Values((), 0)
"""What is added to a token whose line of control asks for nothing."""


@dataclass(frozen=True)
class Additions:
    """The additions to the scores of n rows.

    Args:
        ids: [n, K] int64 candidates; 0 where a row has fewer than K.
        added: [n, K] float32; 0 there.
    """

    ids: torch.Tensor
    added: torch.Tensor


@dataclass(frozen=True)
class ValueStreams:
    """Evaluates candidates.

    Args:
        heads: stream index → its value head.
        index: stream name → index.
        read_as: stream index → [V] int64, the stream's id for each of the base's, or None.
        chunk: candidates that run at once: as many as there are scratch blocks.
        size: V.
    """

    heads: dict[int, Head]
    index: dict[str, int]
    read_as: dict[int, torch.Tensor | None]
    chunk: int
    size: int

    def plan(
        self, asked: Sequence[Valued], schedule: Schedule, offsets: Int32, lines: int
    ) -> ValuePlan:
        """What the step's candidates need, but for the ids.

        Args:
            asked: n rows.
            schedule: what vLLM scheduled.
            offsets: [Q, S] by how many tokens streams' prompts are shorter.
            lines: N, how many lines of control there are.
        """
        counts = [max(min(v.top_k, self.size) for _, v in one.lines) for one in asked]
        valid = np.arange(max(counts)) < np.array(counts)[:, None]
        parts = [
            _Part.of(asked, self.index, stream, schedule, offsets, valid, self.chunk)
            for stream in self.heads
        ]
        return ValuePlan(asked, lines, valid, tuple(part for part in parts if part.chosen.size))

    def add(
        self,
        plan: ValuePlan,
        staged: Sequence[torch.Tensor],
        line: torch.Tensor | None,
        scores: torch.Tensor,
        hidden: Callable[[int], torch.Tensor],
        run: Run,
        ends: Ends | None,
        note: Note,
    ) -> Additions:
        """The additions of the rows that draw a token in this step.

        Args:
            plan: of the step, n rows.
            staged: its arrays, on the device.
            line: [n] int64 the lines of control of the rows' last tokens; None: no request has
                phases, so the choices are the rows'.
            scores: [n, V] the base's raw scores there; −∞ where an id is no token.
            hidden: stream index → [n, H] its hidden states at the rows' last tokens.
            run: runs candidates through a stream.
            ends: of the n rows, the ids that end a text; None for none.
            note: gets each stream's values, to look for numbers that are none.
        """
        of_line, *tables = staged[:OF_ALL]
        which = slice(-1) if line is None else of_line[line]
        counted, from_prefix, left_out, transform, centre, masked = (t[which] for t in tables)
        ids = scores.topk(plan.valid.shape[1]).indices
        ending = torch.zeros_like(counted)
        if ends is not None:
            ending = ends.of(slice(None), scores.shape[-1]).gather(1, ids)
        added = torch.zeros(ids.shape, dtype=torch.float32, device=scores.device)
        for n, part in enumerate(plan.parts):
            chosen, step_rows, beta, at = staged[OF_ALL + 4 * n : OF_ALL + 4 + 4 * n]
            head = self.heads[part.stream]
            after = self._after(part, head, ids[chosen], at, run)
            prefix = head(hidden(part.stream)[chosen])
            note(part.stream, after.sum(-1) + prefix, step_rows)
            added[chosen] += beta[which][chosen, None] * value_offsets(
                after,
                prefix,
                counted[chosen],
                ending[chosen],
                from_prefix[chosen],
                left_out[chosen],
                transform[chosen],
                centre[chosen],
            )
        # Every id that a masked row names is one of its candidates.
        none = torch.where(masked[:, None], ids[:, :1], 0)
        return Additions(torch.where(counted, ids, none), added)

    def _after(
        self, part: _Part, head: Head, ids: torch.Tensor, at: torch.Tensor, run: Run
    ) -> torch.Tensor:
        """V after each candidate, [n, K] float32; 0 where there is none.

        Args:
            part: of a value stream.
            head: its head.
            ids: [n, K] candidates.
            at: [m] which of the n K there are.
            run: runs them.
        """
        tokens, table = ids.flatten()[at], self.read_as[part.stream]
        if table is not None:
            tokens = table[tokens]
        values, start = [], 0
        for batch in part.batches:
            some = tokens[start : start + batch.rows.size]
            values.append(head(run(part.stream, some, batch)))
            start += batch.rows.size
        after = torch.zeros(ids.numel(), dtype=torch.float32, device=ids.device)
        after[at] = torch.cat(values)
        return after.view(ids.shape)


@dataclass(frozen=True)
class _Part:
    """What one value stream runs in a step, known on the host: n rows and m candidates.

    Args:
        stream: which.
        chosen: [n] which of the step's valued rows.
        beta: [A + 1] float32 its strength, by what may be added (`ValuePlan.choices`).
        at: [m] the candidates' places among n rows of K.
        batches: the m candidates, as many as run at once in each.
    """

    stream: int
    chosen: Int64
    beta: npt.NDArray[np.float32]
    at: Int64
    batches: tuple[Candidates, ...]

    @classmethod
    def of(
        cls,
        asked: Sequence[Valued],
        index: dict[str, int],
        stream: int,
        schedule: Schedule,
        offsets: Int32,
        valid: Bool,
        chunk: int,
    ) -> _Part:
        """Other arguments as of `ValueStreams.plan`.

        Args:
            asked: n rows.
            index: stream name → index.
            stream: which stream.
            schedule: what vLLM scheduled.
            offsets: [Q, S].
            valid: [n, K] which candidates there are.
            chunk: how many run at once.
        """

        def strength(values: Values) -> float:
            return next((b for name, b in values.strengths if index[name] == stream), 0.0)

        beta = [[strength(values) for _, values in one.lines] for one in asked]
        chosen = np.flatnonzero([any(own) for own in beta])
        at = np.flatnonzero(valid[chosen])
        rows = np.array([one.row for one in asked])[chosen][at // valid.shape[1]]
        lengths = (schedule.computed + schedule.lengths - offsets[:, stream])[rows]
        parts = [slice(start, start + chunk) for start in range(0, at.size, chunk)]
        batches = tuple(Candidates.of(rows[part], lengths[part]) for part in parts)
        flat = np.array([*(b for own in beta for b in own), 0.0], np.float32)
        return cls(stream, chosen, flat, at, batches)


@dataclass(frozen=True)
class ValuePlan:
    """The candidates of a step, known on the host before it but for their ids.

    In which phase a request is may be known on the device only: there each row finds what is added
    to it by its line of control.

    Args:
        asked: n rows.
        lines: N.
        valid: [n, K] which candidates there are.
        parts: of the value streams that any row asks.
    """

    asked: Sequence[Valued]
    lines: int
    valid: Bool
    parts: tuple[_Part, ...]

    @property
    def choices(self) -> list[tuple[int, Values]]:
        """(line of control, what it adds), A of them, in the order of the rows."""
        return [choice for one in self.asked for choice in one.lines]

    @property
    def batches(self) -> list[tuple[int, Candidates]]:
        """(stream, what it runs), in the order in which they run."""
        return [(part.stream, batch) for part in self.parts for batch in part.batches]

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """What `ValueStreams.add` reads on the device: which of A + 1 choices each line of control
        is, tables of these, and what is each stream's.
        """
        choices, rows = self.choices, np.array([one.row for one in self.asked])
        of_line = np.full(self.lines, len(choices))
        of_line[[line for line, _ in choices]] = np.arange(len(choices))
        every = [*(values for _, values in choices), NOTHING]
        rules = np.array([v.ends for v in every])
        counts = np.array([v.top_k for v in every])
        found: list[npt.NDArray[Any]] = [
            of_line,
            np.arange(self.valid.shape[1]) < counts[:, None],
            rules == "prefix",
            rules == "zero",
            np.array([TRANSFORMS.index(v.transform) for v in every]),
            np.array([v.centre for v in every]),
            np.array([v.mask for v in every]),
        ]
        for part in self.parts:
            found += [part.chosen, rows[part.chosen], part.beta, part.at]
        return found


Runs = list[tuple[slice, int]]
"""(rows, block): the block is copied to each of the rows. Whole blocks: within one, backends lay
tokens out as they like."""


def broadcast(cache: torch.Tensor, scratch: torch.Tensor, runs: Runs) -> None:
    """Copies blocks of `cache` to rows of `scratch`: a copy for each run, no byte twice."""
    for rows, block in runs:
        scratch[rows] = cache[block]


def gather(cache: torch.Tensor, scratch: torch.Tensor, blocks: torch.Tensor) -> None:
    """The same in one launch, which on a GPU costs less than one for each run.

    Args:
        cache: whole cache of a layer.
        scratch: its scratch blocks.
        blocks: [m ≤ scratch] int64 the block that each row copies. A row whose block has not begun
            copies what it never reads.
    """
    scratch[: blocks.numel()] = cache[blocks]


def candidates_of(scores: torch.Tensor, padded: torch.Tensor | None) -> torch.Tensor:
    """The base's scores as candidates are chosen by, [n, V] float32: rows of padding never are."""
    scores = scores.float()
    return scores if padded is None else scores.index_fill(-1, padded, NEVER)
