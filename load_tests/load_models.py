"""The models of `load_tests.load`: random weights on disk, so that every server reads the same.

A base, two companions of about a tenth of its size, LoRA adapters of the base, and a tokenizer
whose tokens are words, so that a prompt has exactly as many tokens as it has words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from load_tests.adapter_files import RANK, write_lora
from load_tests.shapes import BASE, COMPANION, VOCAB

COMPANIONS = ("expert", "anti")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
POSITIONS = 1024


@dataclass(frozen=True)
class Shapes:
    """What the models look like.

    Args:
        base: as `shapes.BASE`.
        companion: of each companion.
        vocabulary: tokens.
        adapters: how many LoRA adapters of rank `adapter_files.RANK`.
    """

    base: dict[str, int]
    companion: dict[str, int]
    vocabulary: int = VOCAB
    adapters: int = 8

    def adapter_names(self) -> list[str]:
        """lora0, lora1, …"""
        return [f"lora{i}" for i in range(self.adapters)]


REAL = Shapes(BASE, COMPANION)
"""220 M parameters, and 2 × 21 M."""


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words: w4, w5, …, after the special tokens."""
    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i for i in range(len(SPECIAL), size)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
    )


def write_random(folder: Path, shape: dict[str, int], vocabulary: int, seed: int) -> int:
    """A Llama of random bfloat16 weights with its tokenizer; how many parameters it has."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)
    return int(model.num_parameters())


def write_models(folder: Path, shapes: Shapes) -> dict[str, int]:
    """Writes base, companions and adapters into `folder`; the parameters of each model."""
    sizes = {"base": write_random(folder / "base", shapes.base, shapes.vocabulary, 1)}
    for seed, name in enumerate(COMPANIONS, 2):
        sizes[name] = write_random(folder / name, shapes.companion, shapes.vocabulary, seed)
    for seed, name in enumerate(shapes.adapter_names()):
        write_lora(folder / "adapters" / name, seed, shapes.base)
    return sizes


def configuration(shapes: Shapes, engine: dict[str, object]) -> dict[str, object]:
    """The server's configuration, to stand in the models' folder.

    Args:
        shapes: of the models.
        engine: vLLM's arguments.
    """
    tuning = {"method": "proxy_tuning", "expert": COMPANIONS[0], "anti_expert": COMPANIONS[1]}
    ensemble = dict.fromkeys(COMPANIONS, 0.5)
    found: dict[str, object] = {
        "model": "./base",
        "served_model_name": "base",
        "streams": {name: {"model": f"./{name}"} for name in COMPANIONS},
        "profiles": {
            "tuned": {**tuning, "strength": 1.0},
            "gentle": {**tuning, "strength": 0.5},
            "contrast": {"method": "contrastive", "amateur": COMPANIONS[1], "strength": 0.5},
            "ensemble": {"method": "mix", "weights": {"base": 1.0, **ensemble}},
        },
        "adapters": {
            "roots": ["adapters"],
            "preload": [
                {"name": name, "source": f"adapters/{name}"} for name in shapes.adapter_names()
            ],
            "max_loaded": max(1, shapes.adapters),
            "max_rank": 2 * RANK,  # a tenant mixes two
        },
        "engine": engine,
    }
    return found
