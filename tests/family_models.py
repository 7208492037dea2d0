"""Tiny configs of the model families that people run, for `tests.models.make_model`.

Windows are `WINDOW` tokens, so that the tests' prompts are longer. Heads have 32 numbers, the
fewest that vLLM's CPU attention takes, but for multi-head latent attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

WINDOW = 40
"""Tokens of a sliding window."""

LENGTH = 512
"""Positions of each model."""

_SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
"""What most families' configs name alike."""

_INTERLEAVED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def _family(config: str, **more: Any) -> Callable[..., PretrainedConfig]:
    """A family's config: the class in `transformers`, and what differs from `_SMALL`."""

    def make(**common: Any) -> PretrainedConfig:
        given = {**_SMALL, **common, **more}
        kept = {key: value for key, value in given.items() if value is not ...}
        found: PretrainedConfig = getattr(transformers, config)(**kept)
        return found

    return make


def _deepseek(config: str, **more: Any) -> Callable[..., PretrainedConfig]:
    return _family(
        config,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_key_value_heads=4,
        head_dim=...,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        **more,
    )


FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama3": _family(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2.5": _family("Qwen2Config", head_dim=..., hidden_size=128, tie_word_embeddings=True),
    "qwen3-moe": _family("Qwen3MoeConfig", **_EXPERTS),
    "mistral": _family("MistralConfig", sliding_window=WINDOW),
    "mixtral": _family("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _family(
        "Gemma2Config", query_pre_attn_scalar=32, tie_word_embeddings=True, **_INTERLEAVED
    ),
    "gemma3": _family(
        "Gemma3TextConfig", query_pre_attn_scalar=32, tie_word_embeddings=True, **_INTERLEAVED
    ),
    "phi3": _family("Phi3Config", head_dim=..., hidden_size=128, sliding_window=None),
    "gpt-oss": _family("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, **_INTERLEAVED),
    "cohere": _family(
        "CohereConfig", head_dim=..., hidden_size=128, logit_scale=0.25, tie_word_embeddings=True
    ),
    "cohere2": _family(
        "Cohere2Config",
        logit_scale=0.25,
        tie_word_embeddings=True,
        hidden_size=128,
        head_dim=...,
        **_INTERLEAVED,
    ),
    "granite": _family(
        "GraniteConfig",
        head_dim=...,
        hidden_size=128,
        attention_multiplier=0.2,
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "olmo2": _family("Olmo2Config", head_dim=..., hidden_size=128),
    "olmo3": _family("Olmo3Config", head_dim=..., hidden_size=128, **_INTERLEAVED),
    "glm4": _family("Glm4Config"),
    "deepseek-v2": _deepseek("DeepseekV2Config", topk_method="greedy"),
    "deepseek-v3": _deepseek("DeepseekV3Config", topk_method="noaux_tc", scoring_func="sigmoid"),
    "stablelm": _family(
        "StableLmConfig",
        head_dim=...,
        hidden_size=128,
        use_qkv_bias=True,
        partial_rotary_factor=0.5,
    ),
    "falcon": _family(
        "FalconConfig",
        hidden_size=128,
        num_kv_heads=2,
        new_decoder_architecture=True,
        multi_query=False,
        bias=False,
        head_dim=...,
        num_key_value_heads=...,
        intermediate_size=...,
    ),
    "bloom": _family(
        "BloomConfig",
        hidden_size=128,
        n_layer=2,
        n_head=4,
        head_dim=...,
        intermediate_size=...,
        num_key_value_heads=...,
        num_attention_heads=...,
        num_hidden_layers=...,
        max_position_embeddings=...,
        tie_word_embeddings=True,
    ),
    "gemma3n": _family(
        "Gemma3nTextConfig",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=500,
        hidden_size_per_layer_input=32,
        laurel_rank=8,
        altup_num_inputs=4,
        sliding_window=WINDOW,
        activation_sparsity_pattern=[0.0] * 4,
        tie_word_embeddings=True,
        intermediate_size=[128] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
"""Name → config; its class in `transformers` decides the architecture."""
