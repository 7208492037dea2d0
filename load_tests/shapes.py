"""The models of the benchmarks: sizes, and folders that need no weights."""

from __future__ import annotations

import json
from pathlib import Path

BASE = {"hidden_size": 1024, "num_hidden_layers": 14, "heads": 16, "intermediate_size": 2816}
COMPANION = {"hidden_size": 256, "num_hidden_layers": 6, "heads": 4, "intermediate_size": 704}
VOCAB = 32_000

LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "heads": 32, "kv_heads": 8,
            "intermediate_size": 14336}  # fmt: skip
LLAMA_3B = {"hidden_size": 3072, "num_hidden_layers": 28, "heads": 24, "kv_heads": 8,
            "intermediate_size": 8192}  # fmt: skip
LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "heads": 32, "kv_heads": 8,
            "intermediate_size": 8192}  # fmt: skip
"""Of Llama 3.1 8B, 3.2 3B and 3.2 1B (docs/start/real-models.md)."""
LLAMA_VOCAB = 128_256


def gib(shape: dict[str, int], vocabulary: int = VOCAB) -> float:
    """Weights in bfloat16, the two tables apart."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    shared = shape.get("kv_heads", shape["heads"]) / shape["heads"]
    layer = 2 * hidden * hidden * (1 + shared) + 3 * hidden * inner
    return 2 * (shape["num_hidden_layers"] * layer + 2 * vocabulary * hidden) / 2**30


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
        "num_key_value_heads": shape.get("kv_heads", shape["heads"]),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
