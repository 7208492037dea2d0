"""Engine arguments under which a steered model would answer wrongly. Front end; no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

UNDECIDED = (
    "the engine would keep the backend that the first request with a grammar happens to need; "
    "name one, e.g. xgrammar"
)
"""Why `structured_outputs_config.backend: auto` is refused."""

GRAPHS = (
    "vLLM records a step before the streams are bound, and would replay it without them; only "
    "cudagraph_mode NONE gives right answers"
)
"""Why captured graphs are refused."""

CONNECTOR = "a connector would save a twin's keys and values under the base's names"
"""Why KV connectors, LMCache's and vLLM's own offloading among them, are refused."""

SLEEP = "heads are not restored when the engine wakes up"
"""Why sleep mode, of any level, is refused."""

LAYER_NAMES = (
    "compiled code would then hold the names of one stream's layers, and started from vLLM's cache "
    "of it an engine has aborted in malloc"
)
"""Why `VLLM_USE_LAYERNAME=0` is refused."""

_REPLICAS = "run servers with a Redis in common instead"


def _several(value: Any) -> bool:
    return bool(value > 1)


def _given(value: Any) -> bool:
    return value is not None


def _of(config: Any, key: str) -> Any:
    """A setting of one of vLLM's configs, given as a mapping or as an object; None if it is not."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def graphs_of(compilation: Any) -> str:
    """The graph mode that a `compilation_config` asks for; `NONE` where it says nothing."""
    mode = _of(compilation, "cudagraph_mode")
    return "NONE" if mode is None else str(getattr(mode, "name", mode)).upper()


REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("pipeline_parallel_size", _several,
     "the streams cannot be split over pipeline stages; use tensor_parallel_size"),
    ("data_parallel_external_lb", bool, _REPLICAS),
    ("data_parallel_multi_port_external_lb", bool, _REPLICAS),
    ("data_parallel_hybrid_lb", bool, _REPLICAS),
    ("data_parallel_rank", _given, _REPLICAS),
    ("decode_context_parallel_size", _several, "not with several streams in one block table"),
    ("prefill_context_parallel_size", _several, "not with several streams in one block table"),
    ("enable_dbo", bool, "overlapped half-batches would split rows from their coefficients"),
    ("enable_prompt_embeds", bool, "streams read token ids; embeddings fit one model only"),
    ("structured_outputs_config", lambda v: _of(v, "backend") == "auto", UNDECIDED),
    ("load_format", lambda v: v in ("pt", "npcache"),
     "pickles can run code when they are loaded; safetensors only"),
    ("compilation_config", lambda v: graphs_of(v) != "NONE", GRAPHS),
    ("kv_transfer_config", _given, CONNECTOR),
    ("kv_offloading_size", _given, CONNECTOR),
    ("enable_sleep_mode", bool, SLEEP),
)  # fmt: skip
"""(engine argument, whether a value is refused, why)."""


def refusals(engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(argument, sentence) of each engine argument that cannot be served.

    Args:
        engine: vLLM's engine arguments.
    """
    found = []
    for name, refused, why in REFUSED:
        if name in engine:
            try:
                if refused(engine[name]):
                    found.append((name, f"refused (got {engine[name]!r}): {why}"))
            except TypeError:
                found.append((name, f"not a usable value (got {engine[name]!r})"))
    return found


def refused_environment() -> list[str]:
    """A sentence for each of vLLM's environment variables that cannot be served."""
    value = os.environ.get("VLLM_USE_LAYERNAME", "1")
    if value.strip() in ("", "1"):
        return []
    return [f"VLLM_USE_LAYERNAME: refused (got {value!r}): {LAYER_NAMES}; unset it"]


def refused_config(vllm_config: Any) -> list[str]:
    """A sentence for each setting of a finished configuration, and of the environment, that cannot
    be served.

    What vLLM was given need not be what it made of it: platforms, hooks and other settings change
    it on the way.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    mode = graphs_of(vllm_config.compilation_config)
    connector = _of(vllm_config.kv_transfer_config, "kv_connector")
    sleeps = bool(vllm_config.model_config.enable_sleep_mode)
    found = (
        ("compilation_config.cudagraph_mode", mode, mode != "NONE", GRAPHS),
        ("kv_transfer_config.kv_connector", connector, connector is not None, CONNECTOR),
        ("enable_sleep_mode", sleeps, sleeps, SLEEP),
    )
    named = [f"{name}: refused (got {value}): {why}" for name, value, is_, why in found if is_]
    return named + refused_environment()
