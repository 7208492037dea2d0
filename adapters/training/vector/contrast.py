"""Contrast pairs, the states that a model has at them, and the directions between the two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.training.data import read_lines
from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt, read_prompt
from adapters.training.served import Sample

_FORMS = '{"positive": …, "negative": …}, with `prompt` or `messages` where both are replies'


@dataclass(frozen=True)
class Text:
    """One side of a pair.

    Args:
        ids: token ids.
        start: the first that is read.
    """

    ids: tuple[int, ...]
    start: int


Pair = tuple[Text, Text]
"""What is wanted, and what is not."""


def read_pairs(path: Path, model: Path) -> list[Pair]:
    """The pairs of a JSONL file, in a model's tokens.

    Raises:
        BadRecipe: it is missing or empty, or a line is not a pair.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return [_pair(where, entry, tokenizer) for where, entry in read_lines(path)]


def _pair(where: str, entry: Any, tokenizer: Any) -> Pair:
    keys = set(entry) if isinstance(entry, dict) else set()
    rest = keys - {"positive", "negative"}
    if not {"positive", "negative"} <= keys or len(rest) > 1:
        raise BadRecipe("not a pair", field=where, value=sorted(keys) or entry, allowed=_FORMS)
    before: list[int] = []
    if rest:
        prompt = read_prompt(where, {key: entry[key] for key in rest})
        before = _prompt_ids(prompt, tokenizer)
    sides = []
    for key in ("positive", "negative"):
        text = entry[key]
        if not isinstance(text, str) or not text:
            raise BadRecipe("not a text", field=f"{where}: {key}", value=text,
                            allowed="a string that is not empty")  # fmt: skip
        ids = tokenizer(text, add_special_tokens=not rest)["input_ids"]
        sides.append(Text((*before, *ids), len(before)))
    return sides[0], sides[1]


def _prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    if isinstance(prompt.given, str):
        return list(tokenizer(prompt.given)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(
            prompt.given, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # Templates raise what they like.
        raise BadRecipe(f"the chat template fails: {error}", field=prompt.where) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def extremes(samples: Sequence[Sample], given: Sequence[float], each: int) -> list[Pair]:
    """The best and the worst reply to each prompt, where their rewards differ."""
    found = []
    for at in range(0, len(samples), each):
        own = sorted(range(at, at + each), key=lambda i: given[i])
        low, high = own[0], own[-1]
        if given[low] < given[high]:
            found.append((_text(samples[high]), _text(samples[low])))
    return found


def _text(sample: Sample) -> Text:
    return Text((*sample.prompt, *sample.reply), len(sample.prompt))


@torch.inference_mode()
def read_states(
    model: Path, pairs: Sequence[Pair], *, which: str, device: str, dtype: str
) -> torch.Tensor:
    """[pairs, 2, layers, H] float32: the outputs of all decoder layers but the last.

    The last one's is not among the states of `transformers` before the final norm.

    Args:
        model: a folder.
        pairs: of texts in its tokens.
        which: `last` token, or `mean` over the tokens from `start` on.
        device: torch's name of it.
        dtype: of the arithmetic.

    Raises:
        BadRecipe: the model has one layer, or fewer positions than a text.
    """
    body: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    body = body.to(device).eval()
    if body.config.num_hidden_layers < 2:
        raise BadRecipe("has one decoder layer only", field=f"--body {model}", allowed="2 or more")
    positions = getattr(body.config, "max_position_embeddings", None)
    found = []
    for pair in tqdm(pairs, desc="states", unit="pair", disable=None):
        sides = []
        for text in pair:
            if positions is not None and len(text.ids) > positions:
                raise BadRecipe("longer than the model's positions", field="a text",
                                value=len(text.ids), allowed=f"≤ {positions} tokens")  # fmt: skip
            ids = torch.tensor([text.ids], device=device)
            states = body(ids, output_hidden_states=True).hidden_states[1:-1]
            read = torch.stack([layer[0, text.start :].float() for layer in states])
            sides.append((read[:, -1] if which == "last" else read.mean(1)).cpu())
        found.append(torch.stack(sides))
    return torch.stack(found)


def directions(states: torch.Tensor, kind: str) -> torch.Tensor:
    """[layers, H]: from the negative side to the positive one.

    Of kind `component` it is the first right singular vector of the differences (not centred, so
    that what all share counts), as long as the differences are along it in the mean.

    Args:
        states: [pairs, 2, layers, H].
        kind: `mean` or `component`.
    """
    differences = (states[:, 0] - states[:, 1]).double()
    if kind == "mean":
        return differences.mean(0).float()
    found = []
    for own in differences.unbind(1):
        axis = torch.linalg.svd(own, full_matrices=False).Vh[0]
        found.append((own @ axis).mean() * axis)
    return torch.stack(found).float()


def separation(states: torch.Tensor, found: torch.Tensor) -> list[tuple[float, float]]:
    """Per layer: the share of pairs whose positive side lies further along the direction, and the
    mean of the difference along it over its standard deviation (both sides of each pair).

    Args:
        states: [pairs, 2, layers, H].
        found: [layers, H].
    """
    along = (states.double() * found.double()).sum(-1)
    right = (along[:, 0] > along[:, 1]).double().mean(0)
    spread = along.std(0, correction=0).mean(0).clamp_min(1e-12)
    apart = (along[:, 0] - along[:, 1]).mean(0) / spread
    return [(float(r), float(a)) for r, a in zip(right, apart, strict=True)]
