"""Tiny configs of models that also read images, for `tests.models.make_model`.

Their towers are as small as their configs allow: streams leave them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.family_models import LENGTH, WINDOW

_TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
}
_WIDE = {k: v for k, v in {**_TEXT, "hidden_size": 128}.items() if k != "head_dim"}
"""For language parts that have no `head_dim` of their own."""

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_IMAGE, _VIDEO, _BEGIN, _END = 490, 491, 492, 493
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": _IMAGE,
    "video_token_id": _VIDEO,
    "vision_start_token_id": _BEGIN,
    "vision_end_token_id": _END,
}
_INDICES: dict[str, Any] = {
    "image_token_index": _IMAGE,
    "boi_token_index": _BEGIN,
    "eoi_token_index": _END,
}
_INTERLEAVED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def _rows(**more: Any) -> dict[str, Any]:
    """Rotary parameters with three rows of positions."""
    sections = [4, 6, 6]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return {"rope_parameters": {**rope, **more}}


def _vision(
    config: str, text: dict[str, Any], tower: dict[str, Any], tied: bool = False, **more: Any
) -> Callable[..., PretrainedConfig]:
    """A model's config: the class in `transformers`, and its parts."""

    def make(**common: Any) -> PretrainedConfig:
        both = {"tie_word_embeddings": tied}
        found: PretrainedConfig = getattr(transformers, config)(
            text_config={**common, **text, **both}, vision_config=tower, **more, **both
        )
        return found

    return make


VISION: dict[str, Callable[..., PretrainedConfig]] = {
    "gemma3-vision": _vision(
        "Gemma3Config",
        {**_TEXT, "query_pre_attn_scalar": 32, **_INTERLEAVED},
        {**_TOWER, "model_type": "siglip_vision_model"},
        tied=True,
        mm_tokens_per_image=4,
        **_INDICES,
    ),
    "gemma4-vision": _vision(
        "Gemma4Config",
        {
            **_TEXT, **_INTERLEAVED, "num_hidden_layers": 4, "global_head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0,
        },
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
            "global_head_dim": 16,
        },
        tied=True,
        audio_config=None,
        image_token_id=_IMAGE, boi_token_id=_BEGIN, eoi_token_id=_END, audio_token_id=494,
        boa_token_id=495, eoa_token_id=496, video_token_id=_VIDEO,
    ),
    "mistral3": _vision(
        "Mistral3Config",
        {**_TEXT, "model_type": "mistral", "sliding_window": None},
        {**_TOWER, "model_type": "pixtral", "head_dim": 16},
        image_token_index=_IMAGE,
        spatial_merge_size=2,
    ),
    "ministral3": _vision(
        "Mistral3Config",
        {
            **_TEXT, "model_type": "ministral3", "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        {**_TOWER, "model_type": "pixtral", "head_dim": 16},
        tied=True,
        image_token_index=_IMAGE,
        spatial_merge_size=2,
    ),
    "llava": _vision(
        "LlavaConfig",
        {**_TEXT, "model_type": "llama"},
        {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=_IMAGE,
    ),
    "llama4": _vision(
        "Llama4Config",
        {
            **_TEXT, "num_hidden_layers": 4, "intermediate_size_mlp": 128, "num_local_experts": 2,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 64,
            "no_rope_layers": [1, 1, 1, 0], "attn_temperature_tuning": True, "floor_scale": 32,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        },
        {
            **_TOWER, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 32,
            "projector_output_dim": 32, "vision_output_dim": 32,
        },
        **_INDICES,
    ),
    "internvl": _vision(
        "InternVLConfig",
        {**_WIDE, "model_type": "qwen2"},
        {**_TOWER, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=_IMAGE,
        image_seq_length=1,
    ),
    "qwen2-vl": _vision(
        "Qwen2VLConfig",
        {**_WIDE, **_rows()},
        {**_QWEN_TOWER, "embed_dim": 32, "hidden_size": 128},
        **_QWEN_IDS,
    ),
    "qwen2.5-vl": _vision(
        "Qwen2_5_VLConfig",
        {**_WIDE, **_rows()},
        {**_QWEN_TOWER, "fullatt_block_indexes": [0], "window_size": 56, "out_hidden_size": 128},
        tied=True,
        **_QWEN_IDS,
    ),
    "qwen3-vl": _vision(
        "Qwen3VLConfig",
        {**_TEXT, **_rows(mrope_interleaved=True)},
        {
            **_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            "out_hidden_size": 96,
        },
        **_QWEN_IDS,
    ),
    "qwen3-vl-moe": _vision(
        "Qwen3VLMoeConfig",
        {
            **_TEXT, **_rows(mrope_interleaved=True), "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
        {
            **_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            "out_hidden_size": 96,
        },
        **_QWEN_IDS,
    ),
}  # fmt: skip
"""Name → config; its class in `transformers` decides the architecture."""
