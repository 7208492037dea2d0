"""Speculation: one of the target's own streams drafts the tokens that the next step verifies.

vLLM asks for drafts when a step has drawn its tokens (`speculative_config.model` names `Drafter`).
The draft stream has then run every token of a request but the newest, over its own KV, with its
own prompt and adapters; it goes on from there, one pass per draft. The next step runs all streams
over the newest token and the drafts at once, and vLLM's rejection sampler keeps what the steered
distribution allows (arXiv 2211.17192, algorithm 1): whatever is drafted, replies have the steered
distribution.

Lives in the worker. Letters: Q requests of the step, n of them draft, K drafts each, V the base's
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig

from steering.worker.plan.batches import Bool, Int32, Int64, StreamBatch
from steering.worker.plan.request_state import BatchTables
from steering.worker.plan.staging import StagedBatch, stage
from steering.worker.plan.step_plan import StepPlan
from steering.worker.runners.v1_speculation import SpeculationSeam

Score = Callable[[torch.Tensor, StagedBatch], torch.Tensor]
"""Runs the draft stream: ([n] token ids of the base, a batch of n one-token rows) → [n, V] float32
scores over the base's vocabulary, −∞ on ids that it must not draft. It may be changed in place."""


class Drafter:
    """Created by vLLM at its start; proposes drafts after each step."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._model: Any = None

    def load_model(self, model: Any) -> None:
        """Takes over the target, one of whose streams drafts: nothing is loaded."""
        self._model = model

    def propose(
        self, drawn: list[list[int]], counts: Int32, token_ids: Int32, **_: Any
    ) -> list[list[int]]:
        """The drafts of each request: [Q] lists of K, or of none.

        Args:
            drawn: [Q] what the step drew; nothing for a request inside its prompt.
            counts: [≥ Q] tokens of each request, prompt and drawn ones.
            token_ids: [≥ Q, context] these tokens.
        """
        rows = np.flatnonzero([bool(ids) for ids in drawn])
        newest = counts[rows].astype(np.int64) - 1
        drafts = self._model.draft(rows, newest, token_ids[rows, newest])
        return [drafts.get(row, []) for row in range(len(drawn))]


class Drafting:
    """Drafts for the requests of a step.

    Args:
        stream: index of the stream that drafts.
        tokens: K.
        context: tokens of the longest request.
        score: runs the stream.
        seam: to vLLM's sampler.
    """

    def __init__(
        self, stream: int, tokens: int, context: int, score: Score, seam: SpeculationSeam
    ) -> None:
        self._stream, self._tokens, self._context = stream, tokens, context
        self._score, self._seam = score, seam

    def __call__(
        self, tables: BatchTables, rows: Int64, newest: Int64, token_ids: Int32
    ) -> dict[int, list[int]]:
        """Row → its K drafts, for the rows that draft.

        Args:
            tables: of the step.
            rows: [≤ Q] that drew a token.
            newest: of each, the index of the last token that it drew.
            token_ids: of each, that token.
        """
        asks = _asks(tables, rows, newest, self._stream, self._tokens, self._context)
        rows, newest = rows[asks], newest[asks]
        if not rows.size:
            self._seam.offer(rows, [], None)
            return {}
        draws = self._seam.draws(rows)
        ends = newest - tables.offsets[rows, self._stream]
        ids = self._seam.to_device(token_ids[asks].astype(np.int64))
        drafts: list[torch.Tensor] = []
        chances: list[torch.Tensor] = []
        for k in range(self._tokens):
            [batch] = stage([StreamBatch.of(rows, (ends + k).astype(np.int32))], ids.device)
            scores = self._score(ids, batch)
            ids, chance = draws(scores, drafts)
            drafts.append(ids)
            if chance is not None:
                chances.append(chance)
        found: list[list[int]] = torch.stack(drafts, 1).tolist()
        self._seam.offer(rows, found, torch.stack(chances, 1) if chances else None)
        return dict(zip(rows.tolist(), found, strict=True))


@dataclass(frozen=True)
class Drafts:
    """How the steps of Model Runner V2 draft: the stream's most likely ids.

    Args:
        stream: index of the stream that drafts.
        tokens: K.
        context: tokens of the longest request.
        size: V.
    """

    stream: int
    tokens: int
    context: int
    size: int

    def rows(self, plan: StepPlan) -> tuple[Int64, Int32]:
        """([n] requests that draft behind a step, [n] bounds of their newest tokens' indices).

        How many tokens a request has is known on the device only.
        """
        rows, schedule = np.flatnonzero(plan.schedule.draws), plan.schedule
        newest = (schedule.computed + schedule.lengths)[rows]
        asks = _asks(plan.tables, rows, newest, self.stream, self.tokens, self.context)
        return rows[asks], newest[asks]


def _asks(
    tables: BatchTables, rows: Int64, newest: Int64 | Int32, stream: int, tokens: int, context: int
) -> Bool:
    """Which rows draft: those that run the stream, whose KV is then there, and have room for all
    drafts. Not those whose values are evaluated at one position per step.
    """
    asks: Bool = tables.uses[rows, stream] & (newest + tokens < context)
    return asks & ~np.isin(rows, tables.valued)
