"""CAA, CAST, ITI, LoFiT and LoReFT as requests, and each paper's own formula with plain hooks.

Each formula is written here as its paper has it, in `transformers` hooks that count positions; the
engine gets nothing of them but the files. `test_at_once` holds it to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from server.main import run
from tests.adapters.vectors import write
from tests.reference import fresh

LAYER = 1


class Sizes:
    """Of the base; and draws of the papers' parameters.

    Args:
        base: its folder.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        config = json.loads((base / "config.json").read_text())
        self.hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.shared = self.heads // config["num_key_value_heads"]
        self.head = config.get("head_dim") or self.hidden // self.heads
        self._random = torch.Generator().manual_seed(3)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)


Edit = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(states [T, ...] of the tokens that are read now, position of the first, L) → edited states."""


class Edited:
    """A model whose states are edited at one place while it decodes.

    Args:
        base: its folder.
        edit: of the states.
        at: "block": the output of decoder layer `LAYER`; "heads": the input of its o_proj.
    """

    def __init__(self, base: Path, edit: Edit, at: str) -> None:
        self.model, self._edit = fresh(base).double(), edit
        self._first = self._length = 0
        layer = self.model.model.layers[LAYER]
        if at == "block":
            layer.register_forward_hook(self._behind)
        else:
            layer.self_attn.o_proj.register_forward_pre_hook(self._before)

    def _behind(self, _: Any, __: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        state = self._edit(state[0], self._first, self._length)[None]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def _before(self, _: Any, inputs: Any) -> Any:
        return (self._edit(inputs[0][0], self._first, self._length)[None],)

    def decode(self, prompt: list[int], drawn: int) -> tuple[list[int], list[float]]:
        """Ids and their log-probabilities, the most likely one each time."""
        self._first, self._length, cache, ids = 0, len(prompt), None, list(prompt)
        found: tuple[list[int], list[float]] = ([], [])
        for _ in range(drawn):
            with torch.inference_mode():
                out = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache, self._first = out.past_key_values, self._first + len(ids)
            scores = out.logits[0, -1].log_softmax(-1)
            ids = [int(scores.argmax())]
            found[0].append(ids[0])
            found[1].append(float(scores[ids[0]]))
        return found


Recipe = tuple[Path, str, float, Edit, str]
"""(artefact, `where`, weight, the paper's edit, where it is made)."""


def caa(folder: Path, sizes: Sizes) -> Recipe:
    """CAA (2312.06681): h + m · v at every position behind the prompt's instruction."""
    vector, multiplier, behind = 0.5 * sizes.draw(sizes.hidden), -1.5, 4

    def edit(h: torch.Tensor, first: int, length: int) -> torch.Tensor:
        positions = first + torch.arange(len(h))
        return h + multiplier * (positions >= length - behind)[:, None] * vector.double()

    files = write(folder, {str(LAYER): vector})
    return files, json.dumps({"prompt_last": behind, "from": 0}), multiplier, edit, "block"


class Cast:
    """CAST's edit: the prompt's mean state decides whether the reply's states are changed.

    Args:
        condition: c, [H].
        threshold: θ.
        change: strength · v, [H].
    """

    def __init__(self, condition: torch.Tensor, threshold: float, change: torch.Tensor) -> None:
        self._c, self._threshold, self._change = condition.double(), threshold, change.double()
        self.acts = False

    def __call__(self, h: torch.Tensor, first: int, length: int) -> torch.Tensor:
        if not first:
            u = h[:length].mean(0)
            p = torch.tanh(torch.outer(self._c, self._c) / (self._c @ self._c) @ u)
            self.acts = bool(u @ p / (u.norm() * p.norm()) > self._threshold)
        positions = first + torch.arange(len(h))
        return h + (self.acts * (positions >= length))[:, None] * self._change


def cast(folder: Path, sizes: Sizes) -> Recipe:
    """CAST (2409.05907): h + strength · v in the reply, if the prompt meets the condition."""
    vector, condition, strength, threshold = (
        sizes.draw(sizes.hidden),
        sizes.draw(sizes.hidden),
        1.5,
        0.1,
    )
    tensors = {str(LAYER): vector, f"{LAYER}.condition": condition}
    conditions = {str(LAYER): {"above": threshold}}
    files = write(folder, tensors, kind="conditional", gate="prompt", conditions=conditions)
    return files, "", strength, Cast(condition, threshold, strength * vector), "block"


def iti(folder: Path, sizes: Sizes) -> Recipe:
    """ITI (2306.03341): x_head + α σ θ for some heads, at the last position of each pass."""
    alpha, shift = 15.0, torch.zeros(sizes.heads, sizes.head, dtype=torch.float64)
    seen = 0.03 * sizes.draw(12, LAYER + 1, sizes.heads, sizes.head).double()
    labels = torch.arange(12) % 3 == 0
    for head in (0, 2):
        own = seen[:, LAYER, head]
        theta = own[labels].mean(0) - own[~labels].mean(0)
        theta = theta / theta.norm()
        shift[head] = (own @ theta).std(correction=0) * theta

    def edit(x: torch.Tensor, first: int, length: int) -> torch.Tensor:
        x = x.clone()
        x[-1] += alpha * shift.flatten()
        return x

    folder.mkdir(parents=True)
    np.save(folder / "x_head_wise.npy", seen.flatten(2).numpy())
    np.save(folder / "x_labels.npy", labels.numpy())
    files = converted(folder, folder / "x_head_wise.npy", "--labels", str(folder / "x_labels.npy"),
                      "--heads", f"{LAYER}:0,{LAYER}:2", "--model", str(sizes.base), "--scale",
                      str(alpha))  # fmt: skip
    return files, "", 1.0, edit, "heads"


def lofit(folder: Path, sizes: Sizes) -> Recipe:
    """LoFiT (2406.01563): (1 + A) ⊙ x_head + v for some heads, here those of one value."""
    a, v = torch.zeros(sizes.heads, sizes.head), torch.zeros(sizes.heads, sizes.head)
    a[: sizes.shared] = 0.5 * sizes.draw(sizes.head)
    v[: sizes.shared] = 0.3 * sizes.draw(sizes.shared, sizes.head)

    def edit(x: torch.Tensor, first: int, length: int) -> torch.Tensor:
        return (1 + a.double().flatten()) * x + v.double().flatten()

    module, named = f"model.layers.{LAYER}.self_attn", {"A": a, "v": v}
    folder.mkdir(parents=True)
    tensors = {f"{module}.attn_{part}.{head}": value[head].clone()
               for part, value in named.items() for head in range(sizes.heads)}  # fmt: skip
    save_file(tensors, folder / "lofit.safetensors")
    files = converted(folder, folder / "lofit.safetensors", "--model", str(sizes.base))
    return files, "", 1.0, edit, "heads"


def converted(folder: Path, source: Path, *more: str) -> Path:
    """What the command makes of an author's file."""
    assert run(["convert-vectors", str(source), str(folder / "ours"), *more]) == 0
    return folder / "ours"


def loreft(folder: Path, sizes: Sizes) -> Recipe:
    """LoReFT (2404.03592), f7+l7: h + Rᵀ (W h + b − R h) at the ends of the prompt."""
    rank, ends = 4, 7
    r = torch.linalg.qr(sizes.draw(sizes.hidden, rank))[0].T
    w, b = sizes.hidden**-0.5 * sizes.draw(rank, sizes.hidden), sizes.draw(rank)

    def edit(h: torch.Tensor, first: int, length: int) -> torch.Tensor:
        n, positions = min(ends, length // 2), first + torch.arange(len(h))
        own = (positions < n) | ((positions >= length - n) & (positions < length))
        rotate = r.double()
        return h + own[:, None] * ((h @ w.double().T + b.double() - h @ rotate.T) @ rotate)

    where = {"prompt_first": ends, "prompt_last": ends, "halved": True}
    tensors = {f"{LAYER}.rotate": r.T, f"{LAYER}.weight": w, f"{LAYER}.bias": b}
    return write(folder, tensors, kind="loreft", where=where), "", 1.0, edit, "block"


RECIPES = {"CAA": caa, "CAST": cast, "ITI": iti, "LoFiT": lofit, "LoReFT": loreft}
