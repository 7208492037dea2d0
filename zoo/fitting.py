"""Trains a model of the zoo, or an adapter on it, on batches that are made beforehand."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100
"""Label of a token that does not count in the loss."""


def padded(
    tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Token ids and labels of (prompt, reply) pairs; only the reply's tokens have labels."""
    pairs = [[tokenizer.encode(t, add_special_tokens=False) for t in pair] for pair in texts]
    length = max(len(prompt) + len(reply) for prompt, reply in pairs)
    ids = torch.full((len(pairs), length), int(tokenizer.pad_token_id or 0))
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return ids, labels


def fit(
    model: LlamaForCausalLM,
    batches: list[tuple[Tensor, Tensor]],
    rate: float,
    name: str,
) -> None:
    """Train in place with AdamW and a warm-up-then-cosine rate. Wide models run in bfloat16."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(len(batches)))
    mixed = model.config.hidden_size >= 256
    model.train()
    with tqdm(batches, desc=f"{name:<12}", unit="step", disable=None) as bar:
        for step, (ids, labels) in enumerate(bar):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(
                logits.flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=IGNORED,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _warm_cosine(steps: int) -> Any:
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (0.05 * steps))
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor
