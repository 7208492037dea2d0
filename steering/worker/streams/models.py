"""The streams of an engine: their models, built and loaded by vLLM, and their twins. In the worker.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import WeightsMapper

from steering.language import RENAMED, LanguagePart, language_weights
from steering.plan import BASE
from steering.startup import Stage, tell
from steering.worker import ranks
from steering.worker.adapting import lora_seam
from steering.worker.readout import heads
from steering.worker.streams.compiled import read_kept_code
from steering.worker.streams.config import base_config, companion_config, prepare_experts
from steering.worker.streams.kv_layers import (
    Twin,
    attention_layers,
    complete_shared_groups,
    keep_all_blocks,
)


class Streams:
    """The streams that run, base first. Their models become submodules of `owner`, by their names.

    Args:
        owner: the module that vLLM knows.
        sources: the streams beside the base, as `steering.engine_args.StreamSource` fields; those
            with `on` are heads or taps on another stream, and run nothing.
        vllm_config: the engine's.

    Attributes:
        names: [S].
        original: stream → the one whose model it runs; itself, but for twins.
        models: [S], a twin's is its original's.

    Raises:
        ValueError: a stream is of a kind that cannot be served; the message names it.
    """

    def __init__(
        self,
        owner: nn.Module,
        sources: Mapping[str, Mapping[str, Any]],
        vllm_config: VllmConfig,
    ) -> None:
        self._vllm_config = vllm_config
        self._sources = sources
        self.names: tuple[str, ...] = (BASE, *(n for n, s in sources.items() if "on" not in s))
        self.original = {n: sources[n].get("same_as", n) if n != BASE else n for n in self.names}
        self._configs: dict[str, VllmConfig] = {}
        complete_shared_groups()
        read_kept_code()
        for name in self.names:
            if self.original[name] == name:
                config = self._configs[name] = self._config(name)
                prepare_experts(name, config)
                lora_seam.keep_compiling(vllm_config)
                # Else the cache of compiled code would give one stream another's.
                with set_model_tag(f"stream.{name}"):
                    model = initialize_model(vllm_config=config, prefix=name)
                if self._own_names(name) is language_weights:
                    model.hf_to_vllm_mapper = _whole_names(model)
                owner.add_module(name, model)
                keep_all_blocks(config, name)
        self._twins = {
            name: Twin.of(vllm_config, original, name)
            for name, original in self.original.items()
            if original != name
        }
        self.models: list[Any] = [owner.get_submodule(self.original[n]) for n in self.names]

    def _config(self, name: str) -> VllmConfig:
        """The configuration of a stream with a model of its own."""
        if name == BASE:
            return base_config(self._vllm_config)
        source = self._sources[name]
        return companion_config(self._vllm_config, name, source["model"], body="head" in source)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the base from `weights` and every companion from its own checkpoint.

        Returns:
            the names of the owner's parameters that were loaded.
        """
        self._tell(BASE)
        own = self._own_names(BASE)(weights)
        loaded = {f"{BASE}.{name}" for name in self.models[0].load_weights(own)}
        for name, config in self._configs.items():
            if name == BASE:
                continue
            self._tell(name)
            companion, source = self.models[self.names.index(name)], self._sources[name]
            chosen = self._own_names(name)
            if "head" in source:
                folder = Path(source["path"]) if "path" in source else None
                _load_body(companion, config, chosen, folder)
            else:
                _load(companion, config, chosen)
            loaded |= {f"{name}.{parameter}" for parameter, _ in companion.named_parameters()}
        return loaded

    def _tell(self, name: str) -> None:
        """Tells the server whose weights are loaded."""
        if ranks.first():
            number = [*self._configs].index(name) + 1
            tell(Stage("loading", name, number, len(self._configs)))

    def _own_names(self, name: str) -> _Choice:
        """Picks a stream's (name, tensor) pairs among its checkpoint's, with its model's names."""
        overrides = self._configs[name].model_config.hf_overrides
        return language_weights if isinstance(overrides, LanguagePart) else _all

    def layers(self) -> list[dict[str, str]]:
        """[S] KV layer name → name under which the stream's model asks for it; once loaded."""
        found = []
        for name in self.names:
            twin = self._twins.get(name)
            if twin is None:
                found.append({n: n for n in attention_layers(self._vllm_config, name)})
            else:
                twin.refresh(self._vllm_config)
                found.append({layer.layer_name: asked for asked, layer in twin.layers.items()})
        return found


_Weights = Iterable[tuple[str, torch.Tensor]]
_Choice = Callable[[_Weights], _Weights]


def _whole_names(model: Any) -> WeightsMapper:
    """A language part's renames, and those of the whole checkpoint's names, which adapters have."""
    own = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    return WeightsMapper(orig_to_new_prefix=dict(RENAMED)) | own


def _all(weights: _Weights) -> _Weights:
    return weights


def _load(companion: Any, vllm_config: VllmConfig, chosen: _Choice) -> None:
    """Loads a language model; repacking is left to the outer loader, which walks over all.

    Raises:
        ValueError: a tensor of the model is missing.
    """
    loader: Any = get_model_loader(vllm_config.load_config)
    if chosen is _all or not hasattr(loader, "get_all_weights"):
        loader.load_weights(companion, vllm_config.model_config)
        return
    loaded = companion.load_weights(
        chosen(loader.get_all_weights(vllm_config.model_config, companion))
    )
    wanted = {name for name, _ in companion.named_parameters()}
    # vLLM gives quantised models more parameters than a checkpoint need have.
    if vllm_config.quant_config is None and (missing := sorted(wanted - (loaded or wanted))):
        raise ValueError(f"{vllm_config.model_config.model} lacks {missing[0]}")


def _load_body(
    companion: Any, vllm_config: VllmConfig, chosen: _Choice, folder: Path | None
) -> None:
    """Loads the body of a head, a LoRA adapter in `folder` merged in.

    vLLM's models refuse tensors that they do not know, so a head's must not reach them.

    Raises:
        ValueError: a tensor of the body is missing.
    """
    loader: Any = get_model_loader(vllm_config.load_config)
    if not hasattr(loader, "get_all_weights"):  # made-up weights, which need no head either
        loader.load_weights(companion, vllm_config.model_config)
        return
    weights = chosen(loader.get_all_weights(vllm_config.model_config, companion))
    loaded = companion.load_weights(heads.body_weights(weights, folder))
    wanted = {n for n, _ in companion.named_parameters() if not n.startswith("lm_head.")}
    if loaded is not None and (missing := sorted(wanted - loaded)):
        raise ValueError(f"{vllm_config.model_config.model} lacks {missing[0]}")


def hidden_width(model: Any) -> int:
    """Columns of the hidden states that a model's `compute_logits` takes."""
    head = getattr(model, "lm_head", None)
    width: int = getattr(head, "embedding_dim", None) or model.config.hidden_size
    return width
