"""Whether the streams hold the longest request, and the machine holds the streams."""

from __future__ import annotations

import importlib
from typing import Any

from server.checkpoints import Checkpoint
from server.config import Config
from server.diagnosis import Diagnosis, where
from steering.plan import BASE


def context_length(config: Config, base: Checkpoint) -> int | None:
    """Tokens of the longest request: `engine.max_model_len`, else what the base reaches."""
    asked = config.engine.get("max_model_len")
    return asked if isinstance(asked, int) and asked > 0 else base.context


def contexts(config: Config, found: Diagnosis) -> list[str]:
    """Streams that cannot hold the longest request."""
    length = context_length(config, found.streams[BASE].checkpoint)
    if length is None:
        return ["engine.max_model_len: is required, because the base does not say its context"]
    return [
        f"{where(name)}: holds {fact.checkpoint.context} tokens, requests may have {length}; "
        f"set engine.max_model_len to at most {fact.checkpoint.context}"
        for name, fact in found.streams.items()
        if fact.checkpoint.context is not None and fact.checkpoint.context < length
    ]


def memory(config: Config, found: Diagnosis) -> list[str]:
    """Whether the weights fit, and the key-value cache of one request of full length."""
    length = context_length(config, found.streams[BASE].checkpoint) or 0
    dtype = str(config.engine.get("dtype", "auto"))
    weights = sum(
        f.checkpoint.weight_bytes(dtype) for f in found.streams.values() if f.owns_weights
    )
    cache = length * sum(fact.kv_bytes for fact in found.streams.values())
    machine, what = _machine(config)
    given = config.engine.get("kv_cache_memory_bytes")
    lines = []
    if isinstance(given, int) and cache > given:
        lines.append(
            f"engine.kv_cache_memory_bytes: {_size(given)} cannot hold one request of {length} "
            f"tokens, which takes {_size(cache)}"
        )
    needed = weights + (given if isinstance(given, int) else cache)
    if needed > machine:
        lines.append(
            f"memory: {_size(weights)} of weights and {_size(needed - weights)} of key-value cache "
            f"are more than the {_size(machine)} of {what}"
        )
    return lines


def _machine(config: Config) -> tuple[int, str]:
    """(bytes, name) of the memory that the models go into."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        psutil: Any = importlib.import_module("psutil")  # without type hints
        return int(psutil.virtual_memory().available), "free memory"
    cards = int(config.engine.get("tensor_parallel_size", 1))
    share = float(config.engine.get("gpu_memory_utilization", 0.92))
    return int(current_platform.get_device_total_memory() * cards * share), "GPU memory"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
