"""Whether the streams hold the longest request, and the machine holds the streams."""

from __future__ import annotations

import contextlib
import os

from adapters.errors import BadAdapter
from adapters.formats.base import BaseShapes, base_shapes
from server.checks.adapters import slot_bytes
from server.checks.checkpoints import Checkpoint
from server.checks.diagnosis import Diagnosis, where
from server.settings.config import Config
from steering.engine_args import SCRATCH
from steering.plan import BASE

ROOM = 64
"""Requests of full length that the key-value cache has room for by default, on CPUs."""


def context_length(config: Config, base: Checkpoint) -> int | None:
    """Tokens of the longest request: `engine.max_model_len`, else what the base reaches."""
    max_model_len = config.engine.get("max_model_len")
    return max_model_len if isinstance(max_model_len, int) and max_model_len > 0 else base.context


def contexts(config: Config, diagnosis: Diagnosis) -> list[str]:
    """Streams that cannot hold the longest request."""
    length = context_length(config, diagnosis.streams[BASE].checkpoint)
    if length is None:
        return ["engine.max_model_len: is required, because the base does not say its context"]
    return [
        f"{where(name)}: holds {fact.checkpoint.context} tokens, requests may have {length}; "
        f"set engine.max_model_len to at most {fact.checkpoint.context}"
        for name, fact in diagnosis.streams.items()
        if fact.checkpoint.context is not None and fact.checkpoint.context < length
    ]


def memory(config: Config, diagnosis: Diagnosis) -> list[str]:
    """Whether the weights fit, and the key-value cache of one request of full length."""
    weights, request_bytes = _weights(config, diagnosis), _one_request(config, diagnosis)
    machine, what = _machine(config)
    rank_bytes = config.engine.get("kv_cache_memory_bytes")
    cache = rank_bytes * ranks_of(config) if isinstance(rank_bytes, int) else request_bytes
    lines = []
    if request_bytes > cache:
        length = context_length(config, diagnosis.streams[BASE].checkpoint)
        lines.append(
            f"engine.kv_cache_memory_bytes: {_size(cache)} cannot hold one request of {length} "
            f"tokens, which takes {_size(request_bytes)}"
        )
    if weights + cache > machine:
        lines.append(
            f"memory: {_size(weights)} of weights and {_size(cache)} of key-value cache "
            f"are more than the {_size(machine)} of {what}"
        )
    return lines


def cpu_cache_bytes(config: Config, diagnosis: Diagnosis) -> int | None:
    """Bytes of each rank's key-value cache on a CPU, where nobody says how many.

    vLLM's own default takes 92 % of the machine's memory, and refuses to start where something
    else uses more than the rest. Ours has room for `ROOM` requests of full length (fewer where
    fewer may run), but leaves half of the memory that is free.

    Returns:
        None where vLLM's own rule holds: on GPUs, and where a setting says how much to take.
    """
    from vllm.platforms import current_platform

    explicit = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & config.engine.keys()
    if explicit or os.environ.get("VLLM_CPU_KVCACHE_SPACE") or not current_platform.is_cpu():
        return None
    request_bytes, (free, _) = _one_request(config, diagnosis), _machine(config)
    running = config.engine.get("max_num_seqs")
    room = min(ROOM, running) if isinstance(running, int) and running > 0 else ROOM
    half = int(free - _weights(config, diagnosis)) // 2
    scratch = _scratch(config, diagnosis)
    return max(request_bytes, min(room * request_bytes + scratch, half)) // ranks_of(config)


def _weights(config: Config, diagnosis: Diagnosis) -> int:
    """Bytes of all weights, once loaded, with the room for adapters."""
    dtype = str(config.engine.get("dtype", "auto"))
    owners = [f.checkpoint for f in diagnosis.streams.values() if f.owns_weights]
    total = sum(point.weight_bytes(dtype) for point in owners)
    total += _joined(config, diagnosis)
    if config.adapters is not None:
        states = sum(point.layers * point.hidden for point in owners)
        total += slot_bytes(config, config.adapters, _shapes(owners), states)
    return total


def _joined(config: Config, diagnosis: Diagnosis) -> int:
    """Bytes of the tables that lie side by side (`steering.one_product`)."""
    dtype, total = str(config.engine.get("dtype", "auto")), 0
    for streams in config.steering.one_product:
        facts = [diagnosis.streams[n] for n in streams if n in diagnosis.streams]
        owners = [diagnosis.streams[BASE], *(f for f in facts if f.owns_weights)]
        total += sum(
            f.checkpoint.vocabulary * f.checkpoint.hidden * f.checkpoint.item_bytes(dtype)
            for f in owners
        )
    return total


def _scratch(config: Config, diagnosis: Diagnosis) -> int:
    """Bytes of the blocks of the key-value cache in which value streams evaluate candidates."""
    from vllm.platforms import current_platform

    if not any(stream.head == "value" for stream in config.streams.values()):
        return 0
    size = config.engine.get("block_size") or (128 if current_platform.is_cpu() else 16)
    tokens = SCRATCH * config.steering.max_top_k * int(size)
    return tokens * sum(fact.kv_bytes for fact in diagnosis.streams.values())


def _shapes(points: list[Checkpoint]) -> list[BaseShapes]:
    """Shapes of the models whose files are here already."""
    shapes = []
    for point in points:
        with contextlib.suppress(BadAdapter):
            shapes.append(base_shapes(point.folder))
    return shapes


def _one_request(config: Config, diagnosis: Diagnosis) -> int:
    """Bytes of the key-value cache of one request of full length, all streams together."""
    length = context_length(config, diagnosis.streams[BASE].checkpoint) or 0
    return length * sum(fact.kv_bytes for fact in diagnosis.streams.values())


def ranks_of(config: Config) -> int:
    """Devices that the models are split over."""
    size = config.engine.get("tensor_parallel_size")
    return size if isinstance(size, int) and size > 0 else 1


def engines_of(config: Config) -> int:
    """Copies of the models, each with an engine of its own (`engine.data_parallel_size`)."""
    size = config.engine.get("data_parallel_size")
    return size if isinstance(size, int) and size > 0 else 1


def _machine(config: Config) -> tuple[int, str]:
    """(bytes, name) of the memory that the models of one engine go into."""
    from vllm.platforms import current_platform

    ranks, engines = ranks_of(config), engines_of(config)
    if current_platform.is_cpu():
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

        # vLLM binds each rank to the memory of one NUMA node.
        nodes = list(dict.fromkeys(cpu.numa_node for cpu in get_allowed_cpu_list()))
        free = sum(int(get_memory_node_info(n).available_memory) for n in nodes[: ranks * engines])
        return free // engines, "free memory" if engines == 1 else "free memory for each engine"
    share = float(config.engine.get("gpu_memory_utilization", 0.92))
    return int(current_platform.get_device_total_memory() * ranks * share), "GPU memory"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
