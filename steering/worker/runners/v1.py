"""vLLM's Model Runner V1: the view of it, and what the streams change in it.

Checked on vLLM 0.32.0 (CPU build).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steering.refused import refused_config
from steering.wire import unpack
from steering.worker.plan.batches import Int32, Int64, Schedule
from steering.worker.plan.request_state import RequestStates
from steering.worker.readout.watch import Watch
from steering.worker.runners.truncation import V1Truncation
from steering.worker.runners.view import RunnerView, Sampled


class V1View(RunnerView):
    """Reads a V1 runner.

    Args:
        runner: the worker's, after its KV cache was initialised.
        states: of its requests; follows it.

    Raises:
        ValueError: the engine would answer wrongly; the message says why.
    """

    def __init__(self, runner: Any, states: RequestStates) -> None:
        _check(runner)
        super().__init__(runner)
        self._states = states
        self._held: set[str] = set()

    def schedule(self) -> Schedule | None:
        """See `RunnerView`."""
        if not get_forward_context().attn_metadata:
            return None
        batch, count = self.runner.input_batch, self.runner.input_batch.num_reqs
        self._update_states(batch.req_ids)
        draws = ~self.runner.discard_request_mask.np[:count]
        self._hold_generators(draws)
        drafts = np.zeros(count, np.int32)
        if self.runner.speculative_config is not None:
            drafts = self.runner.num_decode_draft_tokens.np[:count].clip(0)
        return Schedule(
            batch.req_ids,
            self.runner.query_start_loc.np[: count + 1],
            batch.num_computed_tokens_cpu[:count],
            draws,
            drafts,
        )

    def _update_states(self, request_ids: Sequence[str]) -> None:
        """V1 has no hook for requests that come and go: the batch is compared."""
        for request_id in request_ids:
            if request_id not in self._states:
                request = self.runner.requests[request_id]
                params = request.sampling_params
                stops = {*(params.stop_token_ids or ()), *params.all_stop_token_ids}
                payload = unpack(params.extra_args)
                self._states.add_request(request_id, payload, request.num_prompt_tokens, stops)
        if len(self._states) > len(request_ids):
            for gone in {*self._states} - {*request_ids}:
                self._states.remove_request(gone)

    def block_table(self, kv_group: int) -> tuple[torch.Tensor, int]:
        """See `RunnerView`."""
        table = self.runner.input_batch.block_table[kv_group]
        return table.get_device_tensor(self.runner.input_batch.num_reqs), table.block_size

    @property
    def kernel_block_sizes(self) -> Sequence[int]:
        """See `RunnerView`."""
        sizes: Sequence[int] = self.runner._kernel_block_sizes
        return sizes

    def adapter_sets(self, requests: int) -> Int64:
        """See `RunnerView`."""
        sets: Int64 = self.runner.input_batch.request_lora_mapping[:requests]
        return sets

    def holds(self, request_id: str) -> bool:
        """See `RunnerView`. The states forget a request that a step leaves out."""
        return request_id in self.runner.requests

    def replies(self, rows: Int64, schedule: Schedule) -> Sequence[Int32]:
        """See `RunnerView`. V1 puts drafts behind the tokens that are there."""
        ids, ends = self.runner.input_batch.token_ids_cpu, schedule.computed + schedule.lengths
        return [np.array(ids[row, : ends[row]], np.int32) for row in rows]

    def _hold_generators(self, draws: Any) -> None:
        """Keeps the random generators of rows that draw no token in this step out of the sampler.

        vLLM lets such rows (chunks of a prompt) draw all the same and then rewinds their
        generators, which a CPU generator cannot do: one request with a seed and a long prompt
        ended the engine.
        """
        batch = self.runner.input_batch
        if self.device.type != "cpu" or not (batch.generators or self._held):
            return
        for row in [row for row in batch.generators if not draws[row]]:
            del batch.generators[row]
            self._held.add(batch.req_ids[row])
        for request_id in list(self._held):
            row = batch.req_id_to_index.get(request_id)
            if request_id not in self.runner.requests:
                self._held.remove(request_id)
            elif row is not None and draws[row]:
                self._held.remove(request_id)
                batch.generators[row] = self.runner.requests[request_id].generator

    def truncate(self, padded: torch.Tensor | None) -> None:
        """See `RunnerView`."""
        self.runner.input_batch.logitsprocs.argmax_invariant.append(V1Truncation(padded))

    def observe(self, watch: Watch, sampled: Sampled) -> None:
        """See `RunnerView`.

        vLLM has a place for the number of NaNs in a request's scores; the flag goes there, to
        `SteeredScheduler`. The sampler is made to show what constraints left of each row.
        """
        runner = self.runner
        keep, constrain = runner._bookkeeping_sync, runner.sampler.apply_logits_processors
        sample = runner._sample

        def with_reports(*args: Any, **options: Any) -> Any:
            output = sample(*args, **options)
            watch.send()
            sampled(output.sampled_token_ids)
            return output

        def constrained(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            left: torch.Tensor = constrain(logits, *args, **options)
            if left.shape[0] == runner.input_batch.num_reqs:
                watch.left(left.amax(-1) == -math.inf)
            return left

        def with_flags(*args: Any, **options: Any) -> Any:
            kept = keep(*args, **options)
            ids = runner.input_batch.req_ids
            flags = {i: flag for i, flag in watch.take().items() if i < len(ids)}
            for row in watch.at_fault:
                _clean(runner, row)
            return ({ids[i]: flag for i, flag in flags.items()}, *kept[1:])

        runner._sample = with_reports
        runner._bookkeeping_sync = with_flags
        runner.sampler.apply_logits_processors = constrained


def _clean(runner: Any, row: int) -> None:
    """Puts zeros where a request's blocks hold no numbers.

    The blocks go to others next, and attention kernels multiply what they may not see by 0: of NaN
    that makes NaN, also far behind a request's last token.

    Args:
        runner: the worker's model runner.
        row: of the request in the step.
    """
    blocks = runner.kv_cache_config.num_blocks
    layers = runner.vllm_config.compilation_config.static_forward_context.values()
    found = (getattr(layer, "kv_cache", None) for layer in layers)
    caches = {c.data_ptr(): c for c in found if isinstance(c, torch.Tensor)}
    tables = [runner.input_batch.block_table[g] for g in range(len(runner.attn_groups))]
    rows = [t.block_table.np[row, : t.num_blocks_per_row[row]] for t in tables]
    own = torch.from_numpy(np.unique(np.concatenate(rows)).astype(np.int64))
    for cache in caches.values():
        if not cache.is_floating_point() or cache.itemsize < 2:
            continue
        if cache.device.type == "cpu" and cache.shape[0] >= blocks:
            cache[own] = cache[own].nan_to_num(0.0, 0.0, 0.0)
        else:  # backends lay blocks out as they like
            cache.nan_to_num_(0.0, 0.0, 0.0)


def _check(runner: Any) -> None:
    """Whether an engine is one that the streams can be bound to.

    Raises:
        ValueError: it would answer wrongly; the message says why.
    """
    if not isinstance(runner, GPUModelRunner):
        raise ValueError(
            "the streams need one of vLLM's model runners, and this engine has "
            f"{type(runner).__name__} of {type(runner).__module__}"
        )
    if runner.scheduler_config.async_scheduling:
        raise ValueError(
            "engine.async_scheduling: refused with vLLM's model runner V1, whose tokens lag behind "
            "the step; set it to false"
        )
    if refused := refused_config(runner.vllm_config):
        raise ValueError("; ".join(refused))
