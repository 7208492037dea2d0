"""Which checkpoints can be a stream, and why others cannot. Front end and worker."""

from __future__ import annotations

from typing import Any

from steering.errors import DoesNotFit
from steering.heads import body_architecture
from steering.language import language_architecture


def stream_architecture(config: Any, *, body: bool = False) -> str:
    """The architecture that a checkpoint is served as.

    Args:
        config: its `transformers` config.
        body: only its hidden states are needed, so a classifier is served as its body.

    Raises:
        DoesNotFit: it cannot be a stream; the message names the architecture and says why.
    """
    names = getattr(config, "architectures", None) or []
    if not names:
        raise DoesNotFit("config.json names no architecture")
    architecture = language_architecture(config) or names[0]
    if body:
        architecture = body_architecture(architecture)
    why = _unsupported(architecture)
    if why is not None:
        raise DoesNotFit(why)
    return architecture


def _unsupported(architecture: str) -> str | None:
    """Why vLLM's model of this architecture cannot be a stream; None if it can."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    if architecture not in ModelRegistry.get_supported_archs():
        return f"vLLM does not support the architecture {architecture}"
    try:
        info = ModelRegistry.models[architecture].inspect_model_cls()
    except Exception as error:  # its module needs a package that is not installed
        reason = str(error).strip().split("\n")[-1]
        return f"vLLM's model for {architecture} cannot be loaded here: {reason}"
    if not info.is_text_generation_model:
        return f"{architecture} does not generate text"
    if info.is_attention_free:
        return (
            f"{architecture} is recurrent: its layers keep a state beside or in place of keys and "
            "values, which streams that lag behind their request cannot share; on "
            f"{current_platform.device_type} too, streams are models of attention alone"
        )
    return None


def is_hybrid(architecture: str) -> bool:
    """Whether layers of a served architecture keep a state beside attention."""
    from vllm import ModelRegistry

    return bool(ModelRegistry.models[architecture].inspect_model_cls().is_hybrid)
