"""The streams' attention layers: which there are, what cache they take, and twins' own.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    replace_as,
)
from vllm.v1.worker import gpu_model_runner

from steering.plan import BASE

_SERVED = (Attention, ChunkedLocalAttention)
"""Layers whose cache is one entry per token, found by a block table, and nothing else."""


def keep_all_blocks(vllm_config: VllmConfig, stream: str) -> list[str]:
    """Prepares a stream's attention layers, once they are built; their names.

    The layers of all streams share a request's blocks. A stream may lag behind the request (its
    prompt is shorter), so no block may be given back because it has left one layer's window: in
    the cache every layer counts as full attention. What the layers compute is not changed.

    Raises:
        ValueError: a layer keeps another kind of state.
    """
    names = []
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not name.startswith(f"{stream}.") or not isinstance(layer, AttentionLayerBase):
            continue
        if isinstance(layer, MambaBase) and stream == BASE:
            continue
        if type(layer) not in _SERVED:
            raise ValueError(
                f"stream {stream!r}: {type(layer).__name__} layers keep a state that the streams "
                "cannot share; allowed: layers of full, sliding-window or chunked attention"
            )
        names.append(name)
        layer.get_kv_cache_spec = _FullSpec(layer)
    return names


def complete_shared_groups() -> None:
    """Lets layers that share another's KV stand in a cache group of unequal layers.

    vLLM adds such layers to the group's names but not to its table of specs, and then fails on
    looking them up. Streams of unequal shapes always make such a group.
    """
    original = gpu_model_runner.add_kv_sharing_layers_to_kv_cache_groups
    if isinstance(original, _WithSpecs):
        return
    gpu_model_runner.add_kv_sharing_layers_to_kv_cache_groups = _WithSpecs(original)


@dataclass(frozen=True)
class _WithSpecs:
    """vLLM's function of that name, and the specs of what it adds."""

    original: Any

    def __call__(self, shared: dict[str, str], groups: list[Any], *more: Any) -> None:
        self.original(shared, groups, *more)
        for group in groups:
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                # The group's memory was counted before: these layers take none.
                specs = group.kv_cache_spec.kv_cache_specs
                for name, target in shared.items():
                    if name in group.layer_names:
                        specs.setdefault(name, specs[target])


@dataclass(frozen=True)
class _FullSpec:
    """The cache spec of a layer, as of full attention."""

    layer: Any

    def __call__(self, vllm_config: VllmConfig) -> Any:
        own = type(self.layer).get_kv_cache_spec(self.layer, vllm_config)
        if not isinstance(own, SlidingWindowSpec | ChunkedLocalAttentionSpec):
            return own
        return replace_as(
            own,
            FullAttentionSpec,
            drop=("sliding_window", "attention_chunk_size", "extra_retained_tokens"),
            block_size=vllm_config.cache_config.block_size,
        )


@dataclass(frozen=True)
class Twin:
    """A stream that runs another stream's module over KV of its own.

    Attention layers are looked up by name in the forward context, so a second set of *layers*
    (which own KV) is enough: the module, its weights and its compiled code are the original's.

    Args:
        layers: name under which the original's module asks for a layer → the layer that answers.
    """

    layers: dict[str, Any]

    @classmethod
    def of(cls, vllm_config: VllmConfig, original: str, prefix: str) -> Twin:
        """Registers a second set of attention layers for the stream built under `original`.

        vLLM then allocates and binds KV for them like for any other layer.

        Raises:
            ValueError: the layers are not looked up by name.
        """
        registered = vllm_config.compilation_config.static_forward_context
        layers = {}
        for name in attention_layers(vllm_config, original):
            if registered[name].use_direct_call:
                raise ValueError(
                    f"stream {prefix!r} cannot share the weights of {original!r}: on this platform "
                    "vLLM does not look attention layers up by name"
                )
            layer = copy(registered[name])
            layer.layer_name = _renamed(name, original, prefix)
            layer.kv_cache = torch.tensor([])
            if target := _shares_kv_of(layer):
                layer.kv_sharing_target_layer_name = _renamed(target, original, prefix)
            registered[layer.layer_name] = layer
            layers[name] = layer
        keep_all_blocks(vllm_config, prefix)
        return cls(layers)

    def refresh(self, vllm_config: VllmConfig) -> None:
        """Takes over what loading changed in the original's layers (scales and the like)."""
        originals = vllm_config.compilation_config.static_forward_context
        for name, layer in self.layers.items():
            own = {key: vars(layer)[key] for key in _OWN if key in vars(layer)}
            vars(layer).update({**vars(originals[name]), **own})


_OWN = ("layer_name", "kv_cache", "kv_sharing_target_layer_name", "get_kv_cache_spec")
"""Attributes of a layer that a twin's copy does not share with the original's."""


def attention_layers(vllm_config: VllmConfig, stream: str) -> list[str]:
    """Names of the attention layers of the stream built under its name."""
    registered = vllm_config.compilation_config.static_forward_context
    return [
        name
        for name, layer in registered.items()
        if name.startswith(f"{stream}.") and isinstance(layer, AttentionLayerBase)
    ]


def _shares_kv_of(layer: Any) -> str | None:
    """Name of the layer whose KV this one reads; None if it has its own."""
    target: str | None = getattr(layer, "kv_sharing_target_layer_name", None)
    return target


def _renamed(name: str, original: str, prefix: str) -> str:
    return prefix + name.removeprefix(original)
