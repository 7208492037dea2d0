"""The models of the benchmarks: sizes, and folders that need no weights."""

from __future__ import annotations

import json
from pathlib import Path

BASE = {"hidden_size": 1024, "num_hidden_layers": 14, "heads": 16, "intermediate_size": 2816}
COMPANION = {"hidden_size": 256, "num_hidden_layers": 6, "heads": 4, "intermediate_size": 704}
VOCAB = 32_000


def write_model(folder: Path, shape: dict[str, int], vocabulary: int = VOCAB) -> None:
    """A Llama configuration without weights (vLLM's dummy loader fills them)."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
