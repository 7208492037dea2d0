"""Speculation on vLLM's Model Runner V2: its speculator is one of the target's own streams.

V2 takes no speculator from outside, so `speculator_hook` replaces its factory for ours. It
verifies K drafts of every request; one that runs no draft stream drafts its newest token again,
which the verification may reject like any other. Drafts are the stream's most likely ids, so
replies have the steered distribution (arXiv 2211.17192, algorithm 1, with a certain draft).

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from steering.worker.plan.batches import Int64, StreamBatch
from steering.worker.plan.staging import StagedBatch, stage, to_device
from steering.worker.plan.step_plan import StepPlan

Score = Callable[[torch.Tensor, StagedBatch], torch.Tensor]
"""As `drafting.Score`."""


class StreamSpeculator(BaseSpeculator):
    """What V2 asks for drafts after each step. Until it is bound it proposes nothing of its own.

    Args:
        vllm_config: the engine's.
        device: of the runner.
        req_states: the runner's states of its requests.
    """

    supports_mm_inputs = False
    draft_logits = None
    """None: the drafts are certain."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        self._states = req_states
        count, tokens = (
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.num_speculative_tokens,
        )
        self._none = torch.zeros(count, tokens, dtype=torch.int64, device=device)
        self.draft: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        """([Q] int64 index of each request's newest token, [Q] int64 that token) → [Q, K]."""

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing: the streams have graphs of their own."""

    def capture(self) -> None:
        """Nothing: see `init_cudagraph_manager`."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *_: Any,
        dummy_run: bool = False,
        **__: Any,
    ) -> torch.Tensor:
        """[Q, K] int64 drafts of the step's requests."""
        if dummy_run or self.draft is None:
            return self._none[: input_batch.num_reqs]
        rows = input_batch.idx_mapping
        newest = self._states.num_computed_tokens.gpu[rows].long()
        return self.draft(newest, last_sampled[rows].view(-1).long())


class DeviceDrafting:
    """Drafts without asking the device anything.

    Args:
        stream: index of the stream that drafts.
        tokens: K.
        context: tokens of the longest request.
        score: runs the stream.
    """

    def __init__(self, stream: int, tokens: int, context: int, score: Score) -> None:
        self._stream, self._tokens, self._context = stream, tokens, context
        self._score = score

    def rows(self, plan: StepPlan) -> Int64:
        """[n] requests that draft: they run the stream, and all drafts fit into the context."""
        schedule, tables = plan.schedule, plan.tables
        asks = schedule.draws & tables.uses[:, self._stream]
        # How many tokens a request has is known on the device only: the host has a bound.
        asks &= schedule.computed + schedule.lengths + self._tokens < self._context
        asks[[row for row, _ in tables.valued]] = False
        return np.flatnonzero(asks)

    def __call__(self, plan: StepPlan, newest: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[Q, K] int64 drafts.

        Args:
            plan: of the step that has just run.
            newest: [Q] int64 index of each request's newest token.
            ids: [Q] int64 these tokens.
        """
        rows, drafts = self.rows(plan), ids[:, None].repeat(1, self._tokens)
        if not rows.size:
            return drafts
        offsets = plan.tables.offsets[rows, self._stream]
        most = (plan.schedule.computed + plan.schedule.lengths)[rows] - offsets
        there, lag = to_device([rows, offsets.astype(np.int64)], ids.device)
        own, ends = ids[there], newest[there] - lag
        batches = [StreamBatch.of(rows, (most + k).astype(np.int32)) for k in range(self._tokens)]
        for k, batch in enumerate(stage(batches, ids.device)):
            own = self._score(own, batch.at(ends + k)).argmax(-1)
            drafts[there, k] = own
        return drafts
