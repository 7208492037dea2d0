"""vLLM's configuration of each stream, and vLLM's hooks for architectures that we stand in for.

vLLM sees one architecture, ours, and looks up what it does for particular ones (gpt-oss, Gemma 4,
DeepSeek, …) by that name. The base's own name travels in its config as `BASE_ARCHITECTURES`.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace
from vllm.distributed import parallel_state
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_config

from steering.engine_args import ARCHITECTURE, BASE_ARCHITECTURES, HYBRID
from steering.families import EXPERTS_ALONE
from steering.heads import body_architecture
from steering.language import LanguagePart, language_architecture
from steering.plan import BASE
from steering.worker.streams.compiled import code_key
from steering.worker.streams.quantisation import quantisation


class BaseHooks(VerifyAndUpdateConfig):
    """Runs what vLLM would run for the base's own architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """As vLLM calls it while it makes a `ModelConfig`."""
        hooks = MODELS_CONFIG_MAP.get(architectures(model_config)[0])
        if hooks is not None:
            hooks.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """As vLLM calls it while it makes a `VllmConfig`."""
        model_config = vllm_config.model_config
        hooks = MODELS_CONFIG_MAP.get(architectures(model_config)[0])
        if hooks is not None:
            hooks.verify_and_update_config(vllm_config)


def register_hooks() -> None:
    """Makes vLLM call `BaseHooks` for our architectures, in this process."""
    MODELS_CONFIG_MAP[ARCHITECTURE] = MODELS_CONFIG_MAP[HYBRID] = BaseHooks


def architectures(model_config: ModelConfig) -> list[str]:
    """The base's own architectures, of the engine's model config."""
    found: list[str] = getattr(model_config.hf_config, BASE_ARCHITECTURES)
    return found


def base_config(vllm_config: VllmConfig) -> VllmConfig:
    """The engine's configuration with the base's own architecture in it."""
    own = architectures(vllm_config.model_config)
    config: VllmConfig = vllm_config.with_hf_config(
        vllm_config.model_config.hf_config, architectures=own
    )
    model_config = config.model_config
    # `with_hf_config` leaves what was found out about the architecture that vLLM sees.
    info, name = model_config.registry.inspect_model_cls(own, model_config)
    model_config._model_info, model_config._architecture = info, name
    _as_configured(model_config)
    config.quant_config = quantisation(BASE, vllm_config, model_config)
    return _within(vllm_config, BASE, config)


def companion_config(
    vllm_config: VllmConfig, stream: str, model: str, *, body: bool = False
) -> VllmConfig:
    """The engine's configuration with another model in it: same dtype, context and device.

    Args:
        vllm_config: the engine's.
        stream: its name.
        model: path or hub id.
        body: only the hidden states are needed. The unembedding is then tied to the embedding,
            so that a checkpoint need not have one and none takes memory.
    """
    base = vllm_config.model_config
    overrides: dict[str, Any] = {}
    whole = get_config(model, base.trust_remote_code)
    language = language_architecture(whole)
    if body:
        own = language or whole.architectures[0]
        overrides = {"architectures": [body_architecture(own)], "tie_word_embeddings": True}
    model_config = ModelConfig(
        model=model,
        tokenizer=model,
        dtype=base.dtype,
        max_model_len=base.max_model_len,
        enforce_eager=base.enforce_eager,
        trust_remote_code=base.trust_remote_code,
        hf_overrides=LanguagePart(model, overrides) if language else overrides,
    )
    # vLLM's hooks change the configuration that they are given. What they decide for this model
    # must not reach the others; only the compilation config is shared (see below).
    own_parts: dict[str, Any] = {
        field.name: copy(part)
        for field in fields(vllm_config)
        if is_dataclass(part := getattr(vllm_config, field.name))
    }
    _as_configured(model_config)
    own_parts |= {
        "model_config": model_config,
        "quant_config": quantisation(stream, vllm_config, model_config),
    }
    own_parts["cache_config"].sliding_window = _window_of_all_layers(model_config)
    return _within(vllm_config, stream, replace(vllm_config, **own_parts))


def _within(engine: VllmConfig, stream: str, config: VllmConfig) -> VllmConfig:
    """A stream's configuration, changed where a stream differs from an engine."""
    others = {k: v for k, v in engine.additional_config.items() if k != "coxswain"}
    key = code_key(stream, engine.additional_config["coxswain"], engine.lora_config)
    config.additional_config = {**others, "coxswain_code": key}
    # Attention layers must register where the runner looks.
    config.compilation_config = engine.compilation_config
    # Adapters are added by our own operation to linear layers. Layers that know of LoRA choose
    # other kernels: those of experts, some that CPUs have not.
    config.lora_config = None
    return config


def _as_configured(model_config: ModelConfig) -> None:
    """Has attention scaled with the position as the checkpoint's config says, in place.

    vLLM takes Llama 4's from the generation config, or else decides by `max_model_len`; and
    Ministral 3's from where Mistral's own format has it.
    """
    config, name = model_config.hf_text_config, "attn_temperature_tuning"
    if hasattr(config, name):
        said = {name: getattr(config, name)}
        model_config.override_generation_config = {
            **said,
            **model_config.override_generation_config,
        }
    rope = getattr(config, "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope and not hasattr(config, "llama_4_scaling"):
        # vLLM reads it of the whole config, which may be another object.
        model_config.hf_config.llama_4_scaling = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }


def _window_of_all_layers(model_config: ModelConfig) -> int | None:
    """The sliding window of a model of which all layers slide, in tokens; else None.

    A cache config's window is that of every layer which does not set its own, so models with
    layers of both kinds must not have one there (as in vLLM's `EngineArgs`).
    """
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    if kinds is not None and any(kind != "sliding_attention" for kind in kinds):
        return None
    window: int | None = model_config.get_sliding_window()
    return window


def prepare_experts(stream: str, config: VllmConfig) -> None:
    """Makes the process group that mixture-of-experts layers need, which vLLM makes only if the
    base has such layers.

    Args:
        stream: the name of a stream, for the error.
        config: of that stream.

    Raises:
        ValueError: the stream has experts, and the engine runs data or expert parallel.
    """
    if not config.model_config.is_moe:
        return
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.enable_expert_parallel:
        raise ValueError(f"stream {stream!r} {EXPERTS_ALONE}")
    # Every rank of the engine comes here in the same order.
    if parallel_state._EP is None:
        world = parallel_state.get_world_group()
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [parallel_state.get_tp_group().ranks],
            world.local_rank,
            torch.distributed.get_backend(world.device_group),
            group_name="ep",
        )
