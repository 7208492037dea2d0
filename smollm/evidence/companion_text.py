"""Text that the base writes, with its distributions: what a companion is distilled from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

TOP = 32
"""How many of the likeliest next tokens are kept at each position."""

_SUBJECTS = """
the sea|the moon|bees|bread|mountains|music|the heart|rice|bicycles|winter|elephants|trains|honey|
volcanoes|chess|cotton|the Sun|rivers|libraries|coffee|whales|bridges|democracy|the printing press|
glass|gravity|dreams|horses|vaccines|the desert|painting|salt|clouds|languages|paper|dogs|money|
earthquakes|football|gardens|the Roman Empire|electricity|birds|tea|computers|forests|clocks|poetry|
maps|the brain|sleep|tomatoes|steel|friendship|planets|cheese|photosynthesis|castles|rain|magnets
"""
_ASKED = (
    "Tell me about {}.",
    "What is interesting about {}?",
    "Write two sentences about {} for children.",
    "Why does {} matter?",
    "Give me three facts about {}.",
    "Write a short story about {}.",
    "How would you explain {} to a friend?",
    "List some words that go with {}.",
)


@dataclass(frozen=True)
class Written:
    """One text: token ids [n], and for its positions `start - 1` to `n - 2` what the base expects.

    `top`: ids of the `TOP` likeliest next tokens, int64 [n - start, TOP]; `log_probs`: theirs, in
    nats over the whole vocabulary, float32, likeliest first.
    """

    ids: Tensor
    start: int
    top: Tensor
    log_probs: Tensor


def subjects(count: int, seed: int) -> list[str]:
    """Everyday requests about many subjects, in random order."""
    pairs = [a.format(s.strip()) for a in _ASKED for s in _SUBJECTS.replace("\n", "").split("|")]
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def chat_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """A chat of one question, up to where the reply begins."""
    asked = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(str(text), add_special_tokens=False))


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    end: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 64,
) -> list[Written]:
    """Lets a model write after prompts, sampled from its whole distribution or greedily.

    Args:
        model: in evaluation mode.
        prompts: token ids; each has at least one.
        tokens: the most that are written after each.
        end: the id that ends a text; it is kept.
        temperature: 0: the likeliest token.
        seed: of the sampling.
        rows: prompts at a time. Those of about one length go together: they are padded.
    """
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Written] = {}
    for at in range(0, len(order), rows):
        places = order[at : at + rows]
        some = [prompts[i] for i in places]
        written = _write(model, some, tokens, end, temperature, generator)
        found.update(zip(places, written, strict=True))
    return [found[i] for i in range(len(prompts))]


def _write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    end: int,
    temperature: float,
    generator: torch.Generator,
) -> list[Written]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), end)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    cache, places = DynamicCache(), mask.cumsum(1) - 1
    step, running = ids, torch.ones(len(prompts), dtype=torch.bool)
    tops, chosen = [], []
    for _ in range(tokens):
        logits = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=places.clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        log_probs = logits.float().log_softmax(-1)
        tops.append(log_probs.topk(TOP))
        step = _next(log_probs, temperature, generator)
        chosen.append(step)
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        places = places[:, -1:] + 1
        running &= step[:, 0] != end
        if not running.any():
            break
    reply = torch.cat(chosen, 1)
    top = torch.stack([one.indices for one in tops], 1)
    values = torch.stack([one.values for one in tops], 1)
    found = []
    for row, prompt in enumerate(prompts):
        ends = (reply[row] == end).nonzero()
        length = int(ends[0]) + 1 if len(ends) else reply.shape[1]
        whole = torch.cat([torch.tensor(prompt), reply[row, :length]])
        kept = top[row, :length].clone(), values[row, :length].clone()
        found.append(Written(whole, len(prompt), *kept))
    return found


def _next(log_probs: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return log_probs.argmax(-1, keepdim=True)
    return torch.multinomial((log_probs / temperature).softmax(-1), 1, generator=generator)


def save_texts(texts: Sequence[Written], file: Path) -> None:
    """Writes texts with their distributions as one safetensors file."""
    tensors = {
        "ids": torch.cat([one.ids for one in texts]),
        "lengths": torch.tensor([len(one.ids) for one in texts]),
        "starts": torch.tensor([one.start for one in texts]),
        "top": torch.cat([one.top for one in texts]),
        "log_probs": torch.cat([one.log_probs for one in texts]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def load_texts(file: Path) -> list[Written]:
    """What `save_texts` wrote."""
    tensors = load_file(file)
    lengths, starts = tensors["lengths"].tolist(), tensors["starts"].tolist()
    replies = [length - start for length, start in zip(lengths, starts, strict=True)]
    return [
        Written(ids, start, top, log_probs)
        for ids, start, top, log_probs in zip(
            torch.split(tensors["ids"], lengths),
            starts,
            torch.split(tensors["top"], replies),
            torch.split(tensors["log_probs"], replies),
            strict=True,
        )
    ]
