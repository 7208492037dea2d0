"""Checkpoints that also read images or sound: their language part, which is what streams serve.

The towers are neither built nor loaded. vLLM sees a text model: its config is the checkpoint's
`text_config`, its architecture the language model's own, and its tensors are renamed to that
model's names. Positions are one row per token: the three rows that some of these models have
(M-RoPE, https://arxiv.org/abs/2409.12191 section 2.1) are equal for text.

Front end and worker; loads neither torch nor weights when imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from steering.errors import DoesNotFit

SERVED = (
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Architectures of which the language part is known."""

_KINDS: Mapping[str, str] = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
"""`model_type` of a `text_config` → its architecture."""

RENAMED: tuple[tuple[str, str], ...] = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""Prefixes of a language part's tensors: as `transformers` writes them since 4.52, and before."""

_TOWERS = (
    "audio_tower.",
    "embed_audio.",
    "embed_vision.",
    "multi_modal_projector.",
    "vision_model.",
    "vision_tower.",
    "visual.",
)
"""Prefixes of what is left out, with or without `model.` before them."""


def language_architecture(config: Any) -> str | None:
    """The architecture of a checkpoint's language part; None for a plain language model.

    Args:
        config: its `transformers` config.

    Raises:
        DoesNotFit: it reads more than text, and its language part is not served.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    if name not in SERVED:
        if _reads_more_than_text(name):
            raise DoesNotFit(
                f"{name} reads more than text, and its language part is not known here; those of "
                f"these are served: {', '.join(SERVED)}"
            )
        return None
    kind = str(getattr(getattr(config, "text_config", None), "model_type", None))
    if kind not in _KINDS:
        raise DoesNotFit(
            f"{name}: its text_config is a {kind!r}, which is not known here; allowed: "
            f"{', '.join(_KINDS)}"
        )
    return _KINDS[kind]


def _reads_more_than_text(architecture: str) -> bool:
    """Whether vLLM's model of an architecture takes images, sound or video."""
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    return architecture in _MULTIMODAL_MODELS


@dataclass(frozen=True)
class LanguagePart:
    """For vLLM's `hf_overrides`: the config of a checkpoint's language part in place of its own.

    Args:
        model: path or hub id of the checkpoint.
        changes: attributes that are then set, such as `architectures`.
    """

    model: str
    changes: Mapping[str, Any]

    def __call__(self, config: Any) -> Any:
        """The config that vLLM shall see.

        Args:
            config: the checkpoint's `transformers` config; it is not changed.
        """
        architecture = language_architecture(config)
        part = config
        if architecture is not None:
            part = deepcopy(config.text_config)
            part.architectures = [architecture]
            for name in ("quantization_config", "dtype"):
                value = getattr(part, name, None) or getattr(config, name, None)
                if value is not None:
                    setattr(part, name, value)
            part.tie_word_embeddings = self._tied(config)
            part.rope_parameters = _one_row(getattr(part, "rope_parameters", None))
            if architecture == "Qwen3MoeForCausalLM" and not hasattr(part, "norm_topk_prob"):
                part.norm_topk_prob = True  # what this kind always does
        part.update(self.changes)
        return part

    def _tied(self, config: Any) -> bool:
        """Whether the unembedding is the embedding.

        The whole config decides, not its text part; a checkpoint that has both tables uses both.
        """
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        if not getattr(config, "tie_word_embeddings", False):
            return False
        names = get_safetensors_params_metadata(self.model)
        return not any(renamed(name) == "lm_head.weight" for name in names)


def _one_row(rope: Any) -> Any:
    """Rotary parameters without the sections of several rows of positions."""
    if not isinstance(rope, dict):
        return rope
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return {k: "default" if v == "mrope" else v for k, v in kept.items()}


def renamed(name: str) -> str | None:
    """A tensor's or layer's name in the language part; None for what is left out.

    Args:
        name: as in the checkpoint.
    """
    if name.removeprefix("model.").startswith(_TOWERS):
        return None
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def language_weights(weights: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """The (name, tensor) pairs of the language part, of those of a whole checkpoint."""
    for name, tensor in weights:
        kept = renamed(name)
        if kept is not None:
            yield kept, tensor


def original_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Prefix in the language part → the checkpoint's own for it.

    Args:
        names: of the checkpoint's tensors.
    """
    found: dict[str, str] = {}
    for name in names:
        new = renamed(name)
        if new is None:
            continue
        for start in ("model.", "lm_head"):
            if new.startswith(start):
                found.setdefault(start, name.removesuffix(new.removeprefix(start)))
    return found
