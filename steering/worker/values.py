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

import numpy as np
import torch

from steering.kernels.mix import NEVER, Ends
from steering.kernels.values import value_offsets
from steering.plan import Values
from steering.worker.batches import Candidates, Int32, Int64, Schedule

Asked = tuple[int, Values]
"""(row of the step, what its plan asks for)."""

Run = Callable[[int, torch.Tensor, Candidates], torch.Tensor]
"""(stream, [m] token ids, where they run) → [m, H] hidden states."""

Note = Callable[[int, torch.Tensor, Int64], None]
"""(stream, [m] numbers, [m] rows of the step): a number that is NaN or infinite is a fault."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""[m, H] hidden states → [m] float32."""


@dataclass(frozen=True)
class Additions:
    """What is added to the scores of n rows.

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
    """

    heads: dict[int, Head]
    index: dict[str, int]
    read_as: dict[int, torch.Tensor | None]
    chunk: int

    def add(
        self,
        asked: Sequence[Asked],
        scores: torch.Tensor,
        hidden: Callable[[int], torch.Tensor],
        schedule: Schedule,
        offsets: Int32,
        run: Run,
        ends: Ends | None,
        note: Note,
    ) -> Additions:
        """The additions of the rows that draw a token in this step.

        Args:
            asked: n rows.
            scores: [n, V] the base's raw scores there; −∞ where an id is no token.
            hidden: stream index → [n, H] its hidden states at the rows' last tokens.
            schedule: what vLLM scheduled.
            offsets: [Q, S] by how many tokens streams' prompts are shorter.
            run: runs candidates through a stream.
            ends: of the n rows, the ids that end a text; None for none.
            note: gets what each stream said after the candidates.
        """
        device = scores.device
        k = torch.tensor([values.top_k for _, values in asked], device=device)
        ids = scores.topk(min(int(k.max()), scores.shape[-1])).indices
        valid = torch.arange(ids.shape[1], device=device) < k[:, None]
        ending = torch.zeros_like(valid)
        if ends is not None:
            ending = ends.of(torch.arange(len(asked), device=device), scores.shape[-1])
            ending = ending.gather(1, ids)
        rules = [values.ends for _, values in asked]
        from_prefix = torch.tensor([rule == "prefix" for rule in rules], device=device)
        left_out = torch.tensor([rule == "zero" for rule in rules], device=device)
        added = torch.zeros(ids.shape, dtype=torch.float32, device=device)
        for stream, head in self.heads.items():
            beta = [_strength(values, self.index, stream) for _, values in asked]
            chosen = [j for j, b in enumerate(beta) if b]
            if not chosen:
                continue
            rows = np.array([asked[j][0] for j in chosen])
            lengths = (schedule.computed + schedule.lengths - offsets[:, stream])[rows]
            after = self._after(stream, head, rows, lengths, ids[chosen], valid[chosen], run)
            prefix = head(hidden(stream)[chosen])
            note(stream, after.sum(-1) + prefix, rows)
            found = value_offsets(
                after,
                prefix,
                valid[chosen],
                ending[chosen],
                from_prefix[chosen],
                left_out[chosen],
            )
            added[chosen] += torch.tensor([beta[j] for j in chosen], device=device)[:, None] * found
        return Additions(ids.masked_fill(~valid, 0), added)

    def _after(
        self,
        stream: int,
        head: Head,
        rows: Int64,
        lengths: Int32,
        ids: torch.Tensor,
        valid: torch.Tensor,
        run: Run,
    ) -> torch.Tensor:
        """V after each candidate, [n, K] float32.

        Args:
            stream: which value stream.
            head: its head.
            rows: [n] rows of the step.
            lengths: [n] of the stream's prefix: the candidates' position.
            ids: [n, K] candidates.
            valid: [n, K] which there are.
            run: runs them.
        """
        places = valid.nonzero()
        owner = places[:, 0].cpu().numpy()
        table = self.read_as[stream]
        tokens = ids[valid]
        if table is not None:
            tokens = table[tokens]
        parts = []
        for start in range(0, len(owner), self.chunk):
            part = slice(start, start + self.chunk)
            batch = Candidates.of(rows[owner[part]], lengths[owner[part]])
            parts.append(head(run(stream, tokens[part], batch)))
        found = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        found[valid] = torch.cat(parts)
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


def _strength(values: Values, index: dict[str, int], stream: int) -> float:
    return next((b for name, b in values.strengths if index[name] == stream), 0.0)
