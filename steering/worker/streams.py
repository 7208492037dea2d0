"""The streams of an engine: their models, built and loaded by vLLM, and their twins. In the worker.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.transformers_utils.config import get_config

from steering.heads import body_architecture
from steering.plan import BASE
from steering.worker import heads, lora_seam

# --- the streams --------------------------------------------------------------------------------


class Streams:
    """The streams that run, base first. Their models become submodules of `owner`, by their names.

    Args:
        owner: the module that vLLM knows.
        architectures: of the base.
        sources: the streams beside the base, as `steering.engine_args.StreamSource` fields; those
            with `on` are heads on another stream, and run nothing.
        vllm_config: the engine's.

    Attributes:
        names: [S].
        original: stream → the one whose model it runs; itself, but for twins.
        models: [S], a twin's is its original's.
    """

    def __init__(
        self,
        owner: nn.Module,
        architectures: list[str],
        sources: Mapping[str, Mapping[str, str]],
        vllm_config: VllmConfig,
    ) -> None:
        self._vllm_config = vllm_config
        self._sources = sources
        self.names: tuple[str, ...] = (BASE, *(n for n, s in sources.items() if "on" not in s))
        self.original = {n: sources[n].get("same_as", n) if n != BASE else n for n in self.names}
        self._configs: dict[str, VllmConfig] = {}
        lora_seam.keep_compiling(vllm_config)
        owner.add_module(BASE, _build_base(vllm_config, architectures))
        for name in self.names[1:]:
            if self.original[name] == name:
                source = sources[name]
                config = _companion_config(vllm_config, source["model"], "head" in source)
                lora_seam.keep_compiling(config)
                self._configs[name] = config
                owner.add_module(name, initialize_model(vllm_config=config, prefix=name))
        self._twins = {
            name: _build_twin(vllm_config, original, name)
            for name, original in self.original.items()
            if original != name
        }
        self.models: list[Any] = [owner.get_submodule(self.original[n]) for n in self.names]

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the base from `weights` and every companion from its own checkpoint.

        Returns:
            the names of the owner's parameters that were loaded.
        """
        loaded = {f"{BASE}.{name}" for name in self.models[0].load_weights(weights)}
        for name, config in self._configs.items():
            companion, source = self.models[self.names.index(name)], self._sources[name]
            if "head" in source:
                folder = Path(source["path"]) if "path" in source else None
                _load_body(companion, config, partial(heads.body_weights, folder=folder))
            else:
                loader = get_model_loader(config.load_config)
                # Repacking is left to the outer loader, which walks over all.
                loader.load_weights(companion, config.model_config)
            loaded |= {f"{name}.{parameter}" for parameter, _ in companion.named_parameters()}
        return loaded

    def layers(self) -> list[dict[str, str]]:
        """[S] KV layer name → name under which the stream's model asks for it; once loaded."""
        found = []
        for name in self.names:
            twin = self._twins.get(name)
            if twin is None:
                found.append({n: n for n in _layer_names(self._vllm_config, name)})
            else:
                twin.refresh(self._vllm_config)
                found.append({layer.layer_name: asked for asked, layer in twin.layers.items()})
        return found


# --- their models -------------------------------------------------------------------------------


def _build_base(vllm_config: VllmConfig, architectures: list[str]) -> nn.Module:
    """The base model, unloaded, as its own architecture."""
    return init_vllm_registered_model(vllm_config, prefix=BASE, architectures=architectures)


def _companion_config(vllm_config: VllmConfig, model: str, body: bool = False) -> VllmConfig:
    """The engine's configuration with another model in it: same dtype, context and device.

    Args:
        vllm_config: the engine's.
        model: path or hub id.
        body: only the hidden states are wanted. The unembedding is then tied to the embedding,
            so that a checkpoint need not have one and none takes memory.
    """
    base = vllm_config.model_config
    overrides: dict[str, Any] = {}
    if body:
        own = get_config(model, base.trust_remote_code).architectures[0]
        overrides = {"architectures": [body_architecture(own)], "tie_word_embeddings": True}
    model_config = ModelConfig(
        model=model,
        tokenizer=model,
        dtype=base.dtype,
        max_model_len=base.max_model_len,
        enforce_eager=base.enforce_eager,
        trust_remote_code=base.trust_remote_code,
        hf_overrides=overrides,
    )
    # The sliding window is the model's own; everything else of the cache is shared.
    cache_config = copy(vllm_config.cache_config)
    cache_config.sliding_window = model_config.get_sliding_window()
    config: VllmConfig = replace(
        vllm_config, model_config=model_config, quant_config=None, cache_config=cache_config
    )
    # `replace` may copy it, but attention layers must register where the runner looks.
    config.compilation_config = vllm_config.compilation_config
    return config


def _load_body(
    companion: Any,
    vllm_config: VllmConfig,
    chosen: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterable[tuple[str, torch.Tensor]]],
) -> None:
    """Loads the body of a head; `chosen` picks and changes the checkpoint's (name, tensor) pairs.

    vLLM's models refuse tensors that they do not know, so a head's must not reach them.

    Raises:
        ValueError: a tensor of the body is missing.
    """
    loader: Any = get_model_loader(vllm_config.load_config)
    if not hasattr(loader, "get_all_weights"):  # made-up weights, which need no head either
        loader.load_weights(companion, vllm_config.model_config)
        return
    weights = loader.get_all_weights(vllm_config.model_config, companion)
    loaded = companion.load_weights(chosen(weights))
    wanted = {n for n, _ in companion.named_parameters() if not n.startswith("lm_head.")}
    if loaded is not None and (missing := sorted(wanted - loaded)):
        raise ValueError(f"{vllm_config.model_config.model} lacks {missing[0]}")


def hidden_width(model: Any) -> int:
    """Columns of the hidden states that a model's `compute_logits` takes."""
    head = getattr(model, "lm_head", None)
    width: int = getattr(head, "embedding_dim", None) or model.config.hidden_size
    return width


# --- twins --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Twin:
    """A stream that runs another stream's module over KV of its own.

    Attention layers are looked up by name in the forward context, so a second set of *layers*
    (which own KV) is enough: the module, its weights and its compiled code are the original's.

    Args:
        layers: name under which the original's module asks for a layer → the layer that answers.
    """

    layers: dict[str, Attention]

    def refresh(self, vllm_config: VllmConfig) -> None:
        """Takes over what loading changed in the original's layers (scales and the like)."""
        originals = vllm_config.compilation_config.static_forward_context
        for name, layer in self.layers.items():
            own = {"layer_name": layer.layer_name, "kv_cache": layer.kv_cache}
            layer.__dict__.update({**originals[name].__dict__, **own})


def _build_twin(vllm_config: VllmConfig, original: str, prefix: str) -> _Twin:
    """Registers a second set of attention layers for the stream built under prefix `original`.

    vLLM then allocates and binds KV for them like for any other layer.
    """
    registered = vllm_config.compilation_config.static_forward_context
    layers = {}
    for name in _layer_names(vllm_config, original):
        layer = copy(registered[name])
        layer.layer_name = prefix + name.removeprefix(original)
        layer.kv_cache = torch.tensor([])
        registered[layer.layer_name] = layer
        layers[name] = layer
    return _Twin(layers)


def _layer_names(vllm_config: VllmConfig, prefix: str) -> list[str]:
    """Names of the attention layers of the stream built under `prefix`."""
    registered = vllm_config.compilation_config.static_forward_context
    return [name for name in registered if name.startswith(f"{prefix}.")]
