"""The one vLLM entry point (group `vllm.general_plugins`): makes the steered model known."""

from __future__ import annotations

ARCHITECTURE = "SteeredForCausalLM"


def register() -> None:
    """Registers the model class by name; vLLM calls this in every process it starts."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "steering.worker.model:SteeredForCausalLM")
