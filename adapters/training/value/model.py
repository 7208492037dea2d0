"""A language model's body with a value head, while it is trained and as it is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapters.formats.base import base_shapes
from adapters.training import low_rank

HEAD = "v_head.summary"
"""As in TRL's `AutoModelForCausalLMWithValueHead`."""

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "chat_template*", "*.model", "*.tiktoken")  # fmt: skip


class ValueModel:
    """V(s) = w · h(s) + b, h(s) the body's last hidden state, behind its last norm.

    w starts at 0 and b at `mean`. What is trained is float32.

    Args:
        body: its folder; the names of its tensors are those of `transformers`.
        rank: LoRA rank; None: the whole body is trained.
        alpha: the LoRA's α.
        mean: what the value is at the start.
        seed: of the LoRA's start.
        device: where it is trained.
        dtype: of the arithmetic.

    Raises:
        BadRecipe: the body has no layer for a LoRA.
    """

    def __init__(
        self,
        body: Path,
        *,
        rank: int | None,
        alpha: float,
        mean: float,
        seed: int,
        device: str,
        dtype: str,
    ) -> None:
        self._folder, self._alpha = body, alpha
        self._device, self._dtype = device, getattr(torch, dtype)
        own = torch.float32 if rank is None else self._dtype
        model = AutoModelForCausalLM.from_pretrained(body, dtype=own, use_safetensors=True)
        # eval: dropout would make steps random
        self._model: Any = model.requires_grad_(False).eval()
        self._layers: dict[str, low_rank.LowRank] = {}
        if rank is None:
            self._model.base_model.requires_grad_(True)
        else:
            self._layers = low_rank.install(model, base_shapes(body), rank, alpha, seed)
        self._model.to(device)
        with torch.no_grad():
            width = self._hidden([[0]]).shape[-1]
        self._head = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self._head.weight)
        nn.init.constant_(self._head.bias, mean)
        named = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        heads = {f"{HEAD}.{n}": p for n, p in self._head.named_parameters()}
        self.parameters: dict[str, Tensor] = named | heads
        """What is trained, by name."""

    def values(self, rows: Sequence[Sequence[int]], starts: Tensor, states: int) -> Tensor:
        """V after a token and after each of those that follow.

        Args:
            rows: ids, of any lengths.
            starts: [B] int64, the place of each row's first state.
            states: how many of them.

        Returns:
            [B, states] float32; what stands behind a row's end is of no meaning.
        """
        hidden = self._hidden(rows)
        at = (starts[:, None] + torch.arange(states)).clamp(max=hidden.shape[1] - 1)
        at = at[..., None].expand(-1, -1, hidden.shape[-1]).to(self._device)
        return self._head(hidden.gather(1, at).float())[..., 0]

    def _hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, T, H]. The padding is behind the rows, where a causal model does not look."""
        longest = max(map(len, rows))
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        ids = torch.tensor(padded, device=self._device)
        kind = torch.device(self._device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            found = self._model.base_model(input_ids=ids, use_cache=False)
        hidden: Tensor = found.last_hidden_state
        return hidden

    def write(self, folder: Path) -> None:
        """Writes a checkpoint: a PEFT folder with the head, or the whole body with its tokenizer.

        The body keeps the dtype that it has on disk; the head is float32.

        Args:
            folder: what is there is removed.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kept = _dtype_on_disk(self._folder)
        head = {
            f"{HEAD}.{n}": p.detach().cpu().contiguous() for n, p in self._head.named_parameters()
        }
        if self._layers:
            low_rank.write(
                folder,
                self._layers,
                body=self._folder,
                shapes=base_shapes(self._folder),
                alpha=self._alpha,
                dtype=kept,
            )
            save_file(head, folder / "v_head.safetensors", metadata={"format": "pt"})
            return
        self._model.to(kept).save_pretrained(folder, max_shard_size="100TB")
        file = folder / "model.safetensors"
        save_file(load_file(file) | head, file, metadata={"format": "pt"})
        for pattern in _TOKENIZER:
            for found in self._folder.glob(pattern):
                shutil.copyfile(found, folder / found.name)


def _dtype_on_disk(folder: Path) -> torch.dtype:
    with safe_open(min(folder.glob("*.safetensors")), "pt") as file:
        found: torch.dtype = file.get_tensor(min(file.keys())).dtype
    return found
