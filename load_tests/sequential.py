"""The baseline loop: several `transformers` models, one after the other, in static batches.

What research code does, done as well as it goes: KV caches, padding on the left, no gradients,
scores of the last position only. Every member of a batch is computed until the longest is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class SequentialModels:
    """Σ w_i z_i of several models that share a vocabulary, greedily decoded.

    Args:
        models: causal language models of `transformers`.
        weights: w_i.
    """

    def __init__(self, models: Sequence[Any], weights: Sequence[float]) -> None:
        self._models, self._weights = list(models), list(weights)

    @classmethod
    def load(
        cls, folders: Sequence[Path], weights: Sequence[float], dtype: torch.dtype
    ) -> SequentialModels:
        """Reads the models from folders."""
        models = [AutoModelForCausalLM.from_pretrained(f, dtype=dtype).eval() for f in folders]
        return cls(models, weights)

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[list[int]]:
        """The next token of every prompt, `steps` times.

        Args:
            prompts: token ids of each, none empty.
            steps: how many tokens to draw, the most that any of them needs; end tokens do not
                end anything.
        """
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * p + list(own) for p, own in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        caches = [DynamicCache(config=model.config) for model in self._models]
        for _ in range(steps):
            ids = self._scores(ids, mask, places, caches).argmax(-1, keepdim=True)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            places = places[:, -1:] + 1
            yield ids[:, 0].tolist()

    def _scores(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, caches: Sequence[Any]
    ) -> torch.Tensor:
        """[rows, V] of the last position; `ids` are those that the caches do not have."""
        total: torch.Tensor | None = None
        for model, weight, cache in zip(self._models, self._weights, caches, strict=True):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if weight != 1:
                logits = logits * weight
            total = logits if total is None else total + logits
        assert total is not None
        return total
