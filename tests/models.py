"""Tiny random-weight language models on disk, for tests that need real checkpoints.

Every model is deterministic in its seed, has attention heads of size 32 (the smallest that vLLM's
CPU attention takes) and shares one tokenizer. The weights are scaled so that the scores depend on
the whole context and their standard deviation over the vocabulary is `SPREAD`: the greedy choice
is then well separated, and several tokens are plausible. The checkpoints are float32: give vLLM
`dtype="float32"`, its automatic choice would round them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from tests.family_models import FAMILIES
from tests.hybrid_models import HYBRIDS
from tests.vision_models import VISION

VOCAB_SIZE = 500
"""Tokens of the shared tokenizer, and rows of a model's table unless asked otherwise."""

MAX_LENGTH = 512
"""Positions that every model has."""

SPREAD = 2.5
"""Standard deviation of the scores over the vocabulary."""

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
"""The special tokens, ids 0 to 6."""

PAD, BOS, EOS = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXT = """\
A coxswain sits in the stern of a rowing boat, faces the bow, steers, and calls the stroke. The
crew does the work; the coxswain decides where the work goes. Small corrections made early cost
less than large corrections made late, so a good coxswain looks far ahead and touches the rudder
as seldom as possible. In a race the boats start side by side, and each crew has to hold its lane
through wind, waves and the wash of the others. What is the weather like on the river today? Who
wrote the letter about the bridge, and when was it sent? Water boils at 100 degrees at sea level;
it freezes at 0. There were 12 apples, 7 pears and 35 plums in the basket. The old mill beside the
bridge was built in 1846 and rebuilt in 1923 after the flood. Please answer the question in one
short sentence. Thank you for asking: the answer is written on the second page of the book.
def add(first, second): return first + second  # the sum of two numbers
"""


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """The shared tokenizer: byte-level BPE, `VOCAB_SIZE` tokens, with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _llama(**common: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        **common,
    )


def _qwen2(**common: Any) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **common,
    )


def _qwen3(**common: Any) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        **common,
    )


def _gpt2(**common: Any) -> GPT2Config:
    return GPT2Config(n_embd=64, n_layer=3, n_head=2, n_positions=MAX_LENGTH, **common)


def _opt(**common: Any) -> OPTConfig:
    return OPTConfig(
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=MAX_LENGTH,
        **common,
    )


ARCHITECTURES = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gpt2": _gpt2, "opt": _opt}
"""Name → config; hidden sizes, layer counts and head counts all differ."""


def make_model(
    folder: Path, architecture: str, *, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> Path:
    """Writes a model with its tokenizer: safetensors, config.json, tokenizer files; below 2 MB.

    Args:
        folder: made if it is missing.
        architecture: a key of `ARCHITECTURES`, or of the tables of `tests.family_models`,
            `tests.vision_models` and `tests.hybrid_models`.
        seed: two seeds are two unrelated models.
        vocab_size: rows of the model's table. More than `VOCAB_SIZE`: padded rows that stand for
            no token. Less: the model lacks the last ids of the tokenizer.

    Returns:
        `folder`, to pass on as the model's name.
    """
    config = (ARCHITECTURES | FAMILIES | VISION | HYBRIDS)[architecture](
        vocab_size=vocab_size, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    kind = AutoModelForImageTextToText if architecture in VISION else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    _fill(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _fill(model: PreTrainedModel, random: torch.Generator) -> None:
    """Random weights in place; the last norm is scaled so that the scores spread by `SPREAD`."""
    tied = model.config.tie_word_embeddings
    norms: dict[str, torch.nn.Module] = {}
    left = dict(model.named_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            own = [f"{name}.{kind}" for kind in ("weight", "bias")]
            if isinstance(module, torch.nn.Embedding):
                # Small beside what the layers add: a tied table would else repeat its input.
                module.weight.normal_(0, 0.1, generator=random)
            elif isinstance(module, torch.nn.Linear | Conv1D):
                if tied and module is model.get_output_embeddings():
                    continue
                fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                # Sharper attention than 1, or every prompt would look alike.
                gain = 1.5 if any(part in name for part in _SHARP) else 1.0
                module.weight.normal_(0, gain * fan_in**-0.5, generator=random)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=random)
            elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:
                module.weight.uniform_(0.8, 1.2, generator=random)
                if _adds_one(module):
                    module.weight.sub_(1.0)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.1, generator=random)
                norms[name] = module
            else:
                continue
            for parameter in own:
                left.pop(parameter, None)
        for parameter in left.values():  # tables of experts, sinks and the like
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.normal_(0, scale, generator=random)
        _spread(model, norms, random)


_TOWERS = ("vision", "visual", "projector")
"""Parts of the names of modules that read images."""

_SHARP = ("q_proj", "k_proj", "c_attn", "qkv", "query_key_value")


def _adds_one(norm: torch.nn.Module) -> bool:
    """Whether a norm multiplies by 1 + its weight."""
    return type(norm).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm")


def _spread(
    model: PreTrainedModel, norms: dict[str, torch.nn.Module], random: torch.Generator
) -> None:
    """Scales the norm behind the last layer until the scores spread by `SPREAD`."""
    # Those outside the layers; the last one, whatever the order of use.
    norms = {n: m for n, m in norms.items() if not any(part in n for part in _TOWERS)}
    fewest = min(name.count(".") for name in norms)
    last: Any = [norm for name, norm in norms.items() if name.count(".") == fewest][-1]
    ids = torch.randint(
        len(SPECIAL), model.config.get_text_config().vocab_size, (4, 32), generator=random
    )
    for _ in range(3):  # capped scores need more than one
        factor = SPREAD / model(ids).logits.std(-1).mean()
        if _adds_one(last):
            last.weight.add_(1).mul_(factor).sub_(1)
        else:
            last.weight.mul_(factor)
        if getattr(last, "bias", None) is not None:
            last.bias.mul_(factor)
