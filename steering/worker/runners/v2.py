"""vLLM's Model Runner V2: the view of it, and what it keeps of a steered model's requests.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from steering.refused import refused_config
from steering.wire import unpack
from steering.worker.plan.batches import Int64, Schedule
from steering.worker.plan.phases import Replies
from steering.worker.plan.request_state import RequestStates
from steering.worker.readout.watch import Watch
from steering.worker.runners.truncation import V2Truncation
from steering.worker.runners.v2_speculator import StreamSpeculator
from steering.worker.runners.view import RunnerView, Sampled


class _Steered:
    """What vLLM calls around each request and each real step. The runner makes one per engine."""

    model: Any
    batch: InputBatch | None = None
    """The real step that is about to run; None once it has begun, and in dummy runs."""
    block_tables: tuple[torch.Tensor, ...] = ()
    """The last real step's tables: per KV cache group [≥ Q, B] int32."""

    @property
    def states(self) -> RequestStates:
        """The model's states of its requests."""
        states: RequestStates = self.model.states
        return states

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request joins, for the first time or after it was preempted."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        params = new_req_data.sampling_params
        assert params is not None
        stops = {*(params.stop_token_ids or ()), *params.all_stop_token_ids}
        payload, length = unpack(params.extra_args), new_req_data.prompt_len
        self.states.add_request(new_req_data.req_id, payload, length, stops)

    def remove_request(self, req_id: str) -> None:
        """A request has ended, or was preempted."""
        super().remove_request(req_id)  # type: ignore[misc]
        self.states.remove_request(req_id)

    def preprocess_state(
        self, input_batch: InputBatch, block_tables: tuple[torch.Tensor, ...], *rest: Any
    ) -> None:
        """A real step is about to run; dummy runs do not come here."""
        super().preprocess_state(input_batch, block_tables, *rest)  # type: ignore[misc]
        self.batch, self.block_tables = input_batch, block_tables


class SteeredModelState(_Steered, DefaultModelState):
    """The state of a model whose layers are all attention."""


class SteeredHybridModelState(_Steered, MambaHybridModelState):
    """The state of a model whose base has layers that keep a state."""


class V2View(RunnerView):
    """Reads a V2 runner.

    Args:
        runner: the worker's, after its KV cache was initialised.

    Raises:
        ValueError: the engine would answer wrongly; the message says why.
    """

    def __init__(self, runner: Any) -> None:
        _check(runner)
        super().__init__(runner)
        self._state: _Steered = runner.model_state
        # vLLM makes it for few models; ours has blocks zeroed that held no numbers.
        if runner.kv_block_zeroer is None:
            runner._init_kv_zero_meta()
            zeroer: Any = runner.kv_block_zeroer
            zeroer.zero_block_ids([0])  # compiles it; the block is nobody's
        self._rows: Int64 = np.empty(0, np.int64)

    def schedule(self) -> Schedule | None:
        """See `RunnerView`."""
        batch, self._state.batch = self._state.batch, None
        if batch is None:
            return None
        count = batch.num_reqs
        self._rows = batch.idx_mapping_np
        drafts = batch.num_draft_tokens_per_req
        ends = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        return Schedule(
            batch.req_ids,
            batch.query_start_loc_np[: count + 1],
            batch.num_computed_tokens_np.astype(np.int32),
            ends >= batch.prefill_len_np,
            np.zeros(count, np.int32) if drafts is None else drafts,
            self.runner.speculative_config is None,
        )

    def block_table(self, kv_group: int) -> tuple[torch.Tensor, int]:
        """See `RunnerView`."""
        size: int = self.runner.block_tables.block_sizes[kv_group]
        return self._state.block_tables[kv_group][: len(self._rows)], size

    @property
    def fixed_block_tables(self) -> Sequence[tuple[torch.Tensor, int]] | None:
        """See `RunnerView`."""
        tables = self.runner.block_tables
        return list(zip(tables.input_block_tables, tables.block_sizes, strict=True))

    @property
    def kernel_block_sizes(self) -> Sequence[int]:
        """See `RunnerView`."""
        sizes: Sequence[int] = self.runner.kernel_block_sizes
        return sizes

    def adapter_sets(self, requests: int) -> Int64:
        """See `RunnerView`."""
        sets: Int64 = self.runner.lora_state.lora_ids[self._rows].astype(np.int64)
        return sets

    def holds(self, request_id: str) -> bool:
        """See `RunnerView`."""
        return request_id in self._state.states

    def replies(self, rows: Int64, schedule: Schedule) -> Replies:
        """See `RunnerView`."""
        slots = self._rows[rows].astype(np.int64)
        return Replies(self.runner.req_states.all_token_ids.gpu, slots)

    def draft_with(self, draft: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Drafts after each step; see `StreamSpeculator.draft`."""
        self.runner.speculator.draft = draft

    def truncate(self, padded: torch.Tensor | None) -> None:
        """See `RunnerView`."""
        found = V2Truncation(padded, self.runner.max_num_reqs)
        self.runner.sampler.logits_processors.append(found)

    def observe(self, watch: Watch, sampled: Sampled) -> None:
        """See `RunnerView`. The sampler is made to show what constraints left of each row."""
        runner, left = self.runner, list[torch.Tensor]()
        sample, constrain = runner.sample, runner.sampler.apply_sampling_params

        def with_reports(hidden: torch.Tensor, batch: InputBatch, *args: Any) -> Any:
            left.clear()
            output, counts, *rest = sample(hidden, batch, *args)
            ids = output.sampled_token_ids
            places = torch.arange(ids.shape[1], device=ids.device)
            kept = places < counts[:, None]
            if left:  # a part of the step's rows each
                nothing = torch.cat(left)
                rows = batch.cu_num_logits[:-1, None] + places
                watch.left((nothing[rows.clamp(max=len(nothing) - 1)] & kept).any(1))
            sampled(ids.masked_fill(~kept, -1))
            output.num_nans = watch.flags
            return output, counts, *rest

        def constrained(*args: Any, **options: Any) -> torch.Tensor:
            found: torch.Tensor = constrain(*args, **options)
            left.append(found.amax(-1) == -math.inf)
            return found

        runner.sample, runner.sampler.apply_sampling_params = with_reports, constrained


def _check(runner: GPUModelRunner) -> None:
    """Whether an engine is one that the streams can be bound to.

    Raises:
        ValueError: it would answer wrongly; the message says why.
    """
    if not isinstance(runner.model_state, _Steered):
        raise ValueError(
            f"the streams need a model state of their own, and this engine has "
            f"{type(runner.model_state).__name__} of {type(runner.model_state).__module__}"
        )
    if refused := refused_config(runner.vllm_config):
        raise ValueError("; ".join(refused))
    if runner.speculative_config is not None and not isinstance(
        runner.speculator, StreamSpeculator
    ):
        raise ValueError(
            "steering.speculation: this engine's speculator is "
            f"{type(runner.speculator).__name__}; the plugin was not loaded before the runner"
        )
