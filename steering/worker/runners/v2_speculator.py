"""Speculation on vLLM's Model Runner V2: its speculator is one of the target's own streams.

V2 takes no speculator from outside, so `speculator_hook` replaces its factory for ours. It wants K
drafts of every request; of one that does not draft these are its newest token, and the scheduler
takes none of them. Drafts are the stream's most likely ids, so replies have the steered
distribution (arXiv 2211.17192, algorithm 1, with a certain draft).

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator


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
