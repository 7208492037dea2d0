"""Which checkpoints can be a stream, and why others cannot. Front end and worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from steering.errors import DoesNotFit
from steering.heads import body_architecture, is_classifier
from steering.language import language_architecture

PROVEN: Mapping[str, tuple[str, ...]] = {
    "cpu": (
        "FalconH1ForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "NemotronHForCausalLM",
    ),
}
"""Platform → hybrids that may be the base there: those that the tests compare."""


class Boundary(Enum):
    """What a decoder layer of vLLM returns."""

    SUM = "sum"
    """Two tensors whose sum is the state."""

    FIRST = "first"
    """Several tensors, of which the first is the state."""

    WHOLE = "whole"
    """The state."""


BLOCKS: Mapping[str, Boundary] = {
    **dict.fromkeys(
        (
            "vllm.Gemma2DecoderLayer", "vllm.Gemma3DecoderLayer", "vllm.Glm4DecoderLayer",
            "vllm.LlamaDecoderLayer", "vllm.MistralDecoderLayer", "vllm.MixtralDecoderLayer",
            "vllm.Qwen2DecoderLayer", "vllm.Qwen3DecoderLayer", "vllm.Qwen3MoeDecoderLayer",
            "vllm.TransformerBlock",
        ),
        Boundary.SUM,
    ),
    "vllm.CohereDecoderLayer": Boundary.FIRST,
    "vllm.StablelmDecoderLayer": Boundary.FIRST,
    **dict.fromkeys(
        (
            "transformers.Olmo2DecoderLayer", "transformers.Olmo3DecoderLayer", "vllm.BloomBlock",
            "vllm.FalconDecoderLayer", "vllm.GPT2Block", "vllm.GraniteDecoderLayer",
            "vllm.OPTDecoderLayer",
        ),
        Boundary.WHOLE,
    ),
}  # fmt: skip
"""Package and class of decoder layers that vLLM runs → what they return, of the families whose
vectors the tests compare; vectors for others are refused."""


EXPERTS_ALONE = (
    "is a mixture of experts, which runs neither with data_parallel_size > 1 nor with "
    "enable_expert_parallel: engines that run different streams would wait for each other's "
    "collective operations for ever"
)
"""Why a stream with experts is refused."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts."""


def stream_architecture(
    config: Any, *, base: bool, body: bool = False, engine: Mapping[str, Any] | None = None
) -> str:
    """The architecture that a checkpoint is served as.

    Args:
        config: its `transformers` config.
        base: whether it is the base; only that may be a hybrid.
        body: only its hidden states are needed, so a classifier is served as its body.
        engine: vLLM's engine arguments.

    Raises:
        DoesNotFit: it cannot be a stream; the message names the architecture and says why.
    """
    names = getattr(config, "architectures", None) or []
    if not names:
        raise DoesNotFit("config.json names no architecture")
    architecture = language_architecture(config) or names[0]
    if body:
        architecture = body_architecture(architecture)
    elif is_classifier(architecture):
        raise DoesNotFit(
            f"{architecture} gives no token scores; a classifier is a stream with "
            "`head: classifier`"
        )
    why = _unsupported(architecture, base)
    if why is None and getattr(config, "kv_lora_rank", None):
        why = (
            f"{architecture} has multi-head latent attention, which is not served: on CPUs vLLM's "
            "scores differ from those of transformers, and elsewhere they were not compared"
        )
    if why is None and _spreads(engine or {}) and _has_experts(config):
        why = f"{architecture} {EXPERTS_ALONE}"
    if why is not None:
        raise DoesNotFit(why)
    return architecture


def _has_experts(config: Any) -> bool:
    text = getattr(config, "text_config", None) or config
    return any(getattr(text, name, 0) for name in EXPERTS)


def _spreads(engine: Mapping[str, Any]) -> bool:
    """Whether layers run on several engines together."""
    return engine.get("data_parallel_size", 1) > 1 or bool(engine.get("enable_expert_parallel"))


def _unsupported(architecture: str, base: bool) -> str | None:
    """Why vLLM's model of this architecture cannot be a stream; None if it can."""
    from vllm import ModelRegistry

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
        return f"{architecture} is recurrent and has no attention; streams are models that have"
    if info.has_inner_state or info.is_hybrid:
        return _unproven(architecture, base)
    return None


def _unproven(architecture: str, base: bool) -> str | None:
    """Why a hybrid cannot be a stream; None if it can."""
    from vllm.platforms import current_platform

    kind = f"{architecture} is recurrent: some of its layers keep a state"
    if not base:
        return (
            f"{kind}, which cannot lag behind a request as a companion's keys and values can; "
            "such a model can only be the base"
        )
    platform = current_platform.device_type
    proven = PROVEN.get(platform, ())
    if architecture in proven:
        return None
    if proven:
        return (
            f"{kind}, and vLLM's kernels for it on this platform ({platform}) are missing or were "
            f"not compared; allowed as the base: {', '.join(proven)}"
        )
    return f"{kind}, and no such base was compared on this platform ({platform})"


def is_hybrid(architecture: str) -> bool:
    """Whether some layers of a served architecture keep a state; no other is served."""
    return architecture in {name for names in PROVEN.values() for name in names}


def beside_hybrid(
    architecture: str, *, twins: Sequence[str], speculates: bool, engine: Mapping[str, Any]
) -> list[str]:
    """The features that a hybrid base excludes, one sentence each.

    Args:
        architecture: the base's.
        twins: streams that share its weights.
        speculates: whether a stream drafts.
        engine: vLLM's engine arguments.
    """
    wanted = [
        (f"stream {name!r}, which would share its weights: it would need states of its own", True)
        for name in twins
    ]
    wanted += [
        ("speculation: drafts that are not taken would have changed the states", speculates),
        ("adapters: not compared with this kind of base", bool(engine.get("enable_lora"))),
        (
            "enable_prefix_caching: states would have to be kept with the blocks",
            bool(engine.get("enable_prefix_caching")),
        ),
    ]
    return [
        f"{architecture} is recurrent: some of its layers keep a state; not beside it: {what}"
        for what, is_wanted in wanted
        if is_wanted
    ]
