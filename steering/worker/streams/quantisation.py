"""Each stream's quantisation: by its own checkpoint, whose rules name layers as it does.

A scheme decides layer by layer, by name: exclusions, other widths, regular expressions. In the
engine a layer's name begins with its stream's, and a checkpoint that also reads images names its
language part's layers in another way; so every rule would miss. Each stream therefore has a
config of its own, which is asked with the checkpoint's names.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from steering.language import LanguagePart, original_prefixes


class CheckpointName(str):
    """A layer's name as its checkpoint has it."""

    __slots__ = ()


def quantisation(stream: str, vllm_config: VllmConfig, model_config: ModelConfig) -> Any:
    """The quantisation config of a stream's checkpoint; None if it is not quantised.

    Args:
        stream: under whose name the stream's layers are built.
        vllm_config: the engine's.
        model_config: the stream's.

    Raises:
        ValueError: the platform or the engine's dtype does not fit, or adapters do not; the message
            names the stream.
    """
    try:
        found = VllmConfig.get_quantization_config(model_config, vllm_config.load_config)
    except ValueError as error:
        raise ValueError(f"stream {stream!r}: {error}") from error
    if found is not None:
        if why := _not_on_cpus(found, adapts=vllm_config.lora_config is not None):
            raise ValueError(f"stream {stream!r}: {why}")
        prefixes: dict[str, str] = {}
        if isinstance(model_config.hf_overrides, LanguagePart):
            prefixes = original_prefixes(get_safetensors_params_metadata(model_config.model))
        ask_by_checkpoint_names(found, stream, prefixes)
    return found


def _not_on_cpus(config: Any, *, adapts: bool) -> str | None:
    """Why a CPU cannot run a scheme that vLLM would let start; None if it can."""
    if not current_platform.is_cpu():
        return None
    kinds = {
        (scheme["weights"].type, scheme["weights"].num_bits)
        for scheme in getattr(config, "target_scheme_map", {}).values()
        if scheme and scheme.get("weights") is not None
    }
    fp8 = "fp8" in config.get_name() or ("float", 8) in kinds
    if fp8 and not torch.cpu._is_amx_tile_supported():
        return "its weights are FP8, which vLLM runs on GPUs and on CPUs with AMX, not on this one"
    if adapts and ("int", 8) in kinds:
        return "its weights are int8, on which vLLM has no adapters on CPUs"
    return None


def ask_by_checkpoint_names(config: Any, stream: str, prefixes: dict[str, str]) -> None:
    """Makes a quantisation config see the checkpoint's names, in place.

    vLLM asks in one place (`resolve_quant_method`), with these methods.

    Args:
        config: of one stream alone.
        stream: what the layers' names begin with.
        prefixes: see `steering.language.original_prefixes`.
    """
    for asked in (config, config.online_quantization_config):
        for method in ("get_quant_method", "resolve_quant_method_cls"):
            if hasattr(asked, method):
                setattr(asked, method, _Asked(getattr(asked, method), stream, prefixes))


@dataclass(frozen=True)
class _Asked:
    """One of a config's methods, for names of the engine."""

    method: Callable[[Any, str], Any]
    stream: str
    prefixes: dict[str, str]

    def __call__(self, layer: Any, prefix: str) -> Any:
        return self.method(layer, self._original(prefix))

    def _original(self, name: str) -> CheckpointName:
        if isinstance(name, CheckpointName):  # one method asks the other
            return name
        own = name.removeprefix(f"{self.stream}.")
        for new, old in self.prefixes.items():
            if own.startswith(new):
                return CheckpointName(old + own.removeprefix(new))
        return CheckpointName(own)
