"""Tiny configs of hybrids, state-space layers beside attention, for `tests.models.make_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from tests.family_models import _SMALL, _family

_STATES: dict[str, Any] = {
    **_SMALL,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}

HYBRIDS: dict[str, Callable[..., PretrainedConfig]] = {
    "granite4": _family(
        "GraniteMoeHybridConfig",
        **{**_STATES, "tie_word_embeddings": True},
        num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=96,
        layer_types=["mamba", "attention"] * 2, mamba_n_heads=4, mamba_n_groups=1,
        mamba_d_state=16, mamba_d_head=32, mamba_expand=2, mamba_chunk_size=32,
        position_embedding_type="rope",
    ),
    "falcon-h1": _family(
        "FalconH1Config", **_STATES, mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=16,
        mamba_d_head=32, mamba_d_ssm=128, mamba_expand=2, mamba_chunk_size=32,
    ),
    "nemotron-h": _family(
        "NemotronHConfig", **_STATES, layers_block_type=["mamba", "attention", "mamba", "mlp"],
        mamba_num_heads=4, n_groups=1, ssm_state_size=16, mamba_head_dim=32, expand=2,
        chunk_size=32,
    ),
}  # fmt: skip
"""Name → config; its class in `transformers` decides the architecture."""
