"""Scratch blocks: the last blocks of vLLM's KV cache, into which value streams write candidates.

The scheduler gets fewer blocks than there are, so it hands the last ones to nobody. Runs in
the engine core and in the worker, which count them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig

from steering.engine_args import SCRATCH


def scratch_blocks(vllm_config: VllmConfig, kv_cache_config: Any) -> int:
    """How many blocks are for candidates; 0 without value streams.

    At most half of all: with fewer than a step's candidates these run in several parts.

    Raises:
        ValueError: nothing is left for them beside the longest request.
    """
    settings: Mapping[str, Any] = vllm_config.additional_config["coxswain"]
    if not any(source.get("head") == "value" for source in settings["streams"].values()):
        return 0
    blocks, longest = kv_cache_config.num_blocks, 0
    for group in kv_cache_config.kv_cache_groups:
        size, length = group.kv_cache_spec.block_size, vllm_config.model_config.max_model_len
        longest = max(longest, -(-length // size))
    most = vllm_config.scheduler_config.max_num_batched_tokens
    # One block is vLLM's own.
    count = min(SCRATCH * settings["top_k"], most, max(1, blocks // 2), blocks - 1 - longest)
    if count < 1:
        raise ValueError(
            f"the KV cache has {blocks} blocks, and the longest request takes {longest} of them: "
            "nothing is left for the candidates of value streams; raise kv_cache_memory_bytes or "
            "gpu_memory_utilization, or lower max_model_len"
        )
    return count
