"""Code that vLLM compiles for the streams' models: when, for whom, and kept for later starts.

vLLM compiles a model when it is called first, and keeps the code under `VLLM_CACHE_ROOT` by a hash
of its configuration. A twin runs its original's code.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

from steering.startup import Stage, report
from steering.worker import ranks

READ = "was_aot_compile_fn_loaded_from_disk"
"""vLLM's attribute of a model whose code it has read."""


def read_kept_code() -> None:
    """Lets vLLM read the code that it has kept on CPUs.

    There torch's own backend compiles, and its code needs no further step once it was read. vLLM
    asks for that step all the same, takes its absence for a failure, and compiles again.
    """
    kind: Any = BundledAOTAutogradSerializableCallable
    if not hasattr(kind, "finalize_loading"):
        kind.finalize_loading = _nothing


def _nothing(_code: object, _config: object) -> None:
    pass


def code_key(stream: str, settings: dict[str, Any], lora: Any) -> dict[str, Any]:
    """What a stream's code depends on and its model's configuration does not have.

    vLLM hashes it. What is not in it may change without compiling again: the other streams.

    Args:
        stream: its name, which its layers' names begin with.
        settings: `additional_config["coxswain"]`.
        lora: vLLM's `LoRAConfig`, or None. The stream's own configuration has none, but its
            layers are wrapped if there is one.
    """
    streams: dict[str, dict[str, Any]] = settings["streams"]
    # A tap of a twin reads the layers of the twin's original.
    owner = {name: source.get("same_as", name) for name, source in streams.items()}
    taps = {source["layer"] for source in streams.values()
            if "layer" in source and owner.get(source["on"], source["on"]) == stream}  # fmt: skip
    return {
        "stream": stream,
        "lora": None if lora is None else lora.compute_hash(),
        "vectors": settings["vectors"],
        "taps": sorted(taps),
        # torch chooses by it how wide the vectors of its code are.
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def compiling(model: Any, stream: str, number: int, count: int) -> Iterator[None]:
    """Tells the server when the first call of a model, inside, compiles it.

    Args:
        model: the stream's.
        stream: its name.
        number: of the model, from 1.
        count: of the models.
    """
    parts = [part for part in model.modules() if not getattr(part, "do_not_compile", True)]
    new = [part for part in parts if not _has_code(part)]
    stage = Stage("compiling", stream, number, count)
    first = new and ranks.first()
    begin = time.monotonic()
    if first:
        report(stage)
    yield
    if first and not all(getattr(part, READ, False) for part in new):
        report(replace(stage, doing="compiled", seconds=time.monotonic() - begin))


def _has_code(part: Any) -> bool:
    return bool(part.compiled) or getattr(part, "aot_compiled_fn", None) is not None
