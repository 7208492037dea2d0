"""The steered model whose base is a hybrid: layers with a state beside layers of attention.

The base runs each step exactly as vLLM scheduled it, so vLLM's own cache of states serves it.
Twins and companions of this kind would need states of their own, at positions of their own.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from steering.worker.model import SteeredForCausalLM
from steering.worker.streams.config import architectures


class SteeredHybridForCausalLM(SteeredForCausalLM):
    """As `SteeredForCausalLM`; tells vLLM what states the base keeps."""

    has_inner_state = True
    is_hybrid = True

    @staticmethod
    def get_model_state_cls() -> type:
        """What Model Runner V2 keeps of this model's requests, and of the base's states."""
        from steering.worker.runners.v2 import SteeredHybridModelState

        return SteeredHybridModelState

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        """Shapes of a layer's states."""
        return _base(vllm_config).get_mamba_state_shape_from_config(vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        """Types of a layer's states."""
        return _base(vllm_config).get_mamba_state_dtype_from_config(vllm_config)


def _base(vllm_config: VllmConfig) -> Any:
    """The base's own class."""
    model_config = vllm_config.model_config
    found, _ = model_config.registry.resolve_model_cls(architectures(model_config), model_config)
    return found
