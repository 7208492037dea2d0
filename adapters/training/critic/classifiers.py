"""The classifiers that a critic's training run trains, and the folders that are served.

    Probe     a linear head, or a small network, on the hidden states of a frozen body
    Tagger    transformers' token classifier: a body of its own, trained whole or as a LoRA

Formats: `steering.heads`. Letters: N states, H the hidden size, T positions.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils import logging

from adapters.formats.artefact import Artefact
from adapters.formats.base import base_shapes
from adapters.parts import factors
from adapters.training.errors import BadRecipe
from adapters.training.low_rank import LowRank, install, write

ALPHA = 2.0
"""A LoRA's alpha divided by its rank."""


@dataclass(frozen=True)
class Row:
    """A prompt with its reply.

    Args:
        ids: token ids of both, without the one that ended the reply.
        start: position of the prompt's last token, whose state comes before the reply's first.
        labels: for the positions from `start`, whether the token that follows is critical. Where
            the reply was cut off nothing follows the last position, which has none.
    """

    ids: tuple[int, ...]
    start: int
    labels: tuple[bool, ...]


class Classifier(Protocol):
    """What is trained."""

    parameters: dict[str, Tensor]

    def scores(self, rows: Sequence[int]) -> Tensor:
        """[N] logits of all labelled positions of some rows, one row after the other.

        Args:
            rows: their indices.
        """

    def write(self, folder: Path) -> None:
        """Writes what is served into an empty folder."""


def padded(rows: Sequence[Row], device: str) -> Tensor:
    """[rows, T] int64 ids; what stands behind a row's end changes nothing before it."""
    length = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[0] * (length - len(row.ids))] for row in rows]
    return torch.tensor(ids, device=device)


def labelled(values: Tensor, rows: Sequence[Row]) -> Tensor:
    """[N, …], the labelled positions of [rows, T, …], one row after the other."""
    parts = [v[r.start : r.start + len(r.labels)] for v, r in zip(values, rows, strict=True)]
    return torch.cat(parts)


def load_body(folder: Path, adapter: Artefact | None, dtype: str, device: str) -> Any:
    """The model without its unembedding, an adapter merged in, frozen.

    Raises:
        BadRecipe: it has no module that the adapter changes.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    ).requires_grad_(False)
    for name, part in (adapter.parts[0] if adapter else {}).items():
        assert adapter is not None
        a, b = (tensor.float() for tensor in factors(adapter.folder, part))
        delta = part.scale * (b @ a)
        module = _module(model, name)
        module.weight += delta if isinstance(module, nn.Linear) else delta.T  # Conv1D: [in, out]
    return model.base_model.to(device, getattr(torch, dtype)).eval()


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise BadRecipe("the body has no such module in transformers", field=name) from error


@torch.inference_mode()
def features(body: Any, rows: Sequence[Row], batch: int, device: str, bar: Any) -> list[Tensor]:
    """[N, H] per row: the last hidden states of its labelled positions, behind the last norm.

    Args:
        body: from `load_body`.
        rows: all of them.
        batch: rows in a forward.
        device: of the body.
        bar: progress, counts rows.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # Little is padding.
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        some = [rows[i] for i in part]
        states = body(input_ids=padded(some, device), use_cache=False).last_hidden_state
        sizes = [len(row.labels) for row in some]
        for i, own in zip(part, labelled(states, some).cpu().split(sizes), strict=True):
            found[i] = own.clone()
        bar.update(len(part))
    return found


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


class Probe:
    """A head on states that are computed already; float32.

    Its input is shifted and scaled to mean 0 and deviation 1 over the training states, so that
    one learning rate fits all bodies; `write` folds that into the first layer.

    Args:
        states: [N, H] per row.
        train: rows whose states give mean and deviation.
        share: of the states that are critical, where the probabilities start; above 0, below 1.
        hidden: units of a hidden layer; None: linear. They are tanh: with ReLU all units may die
            where the answer is yes, and the last bias alone is left to say so.
        seed: of the start. The last layer's weights start at 0.
        device: where it is trained.
    """

    def __init__(
        self,
        states: Sequence[Tensor],
        train: Sequence[int],
        share: float,
        hidden: int | None,
        seed: int,
        device: str,
    ) -> None:
        self._states, self._device = states, device
        seen = torch.cat([states[i] for i in train]).double()
        self._mean = seen.mean(0).float().to(device)
        self._deviation = (seen.std(0, correction=0) + 1e-5).float().to(device)
        width = seen.shape[1]
        random = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, Tensor] = {}
        if hidden is not None:
            start = width**-0.5 * torch.randn(hidden, width, generator=random)
            self._add("0.", start, device)
        last = "" if hidden is None else "2."
        self._add(last, torch.zeros(1, hidden or width), device)
        with torch.no_grad():
            self.parameters[f"{last}bias"].fill_(_log_odds(share))

    def _add(self, prefix: str, weight: Tensor, device: str) -> None:
        for name, value in {"weight": weight, "bias": torch.zeros(len(weight))}.items():
            self.parameters[prefix + name] = value.to(device).requires_grad_()

    def scores(self, rows: Sequence[int]) -> Tensor:
        """See `Classifier`."""
        x = torch.cat([self._states[i] for i in rows]).to(self._device).float()
        x = (x - self._mean) / self._deviation
        given = self.parameters
        if "0.weight" in given:
            x = linear(x, given["0.weight"], given["0.bias"]).tanh()
            return linear(x, given["2.weight"], given["2.bias"])[:, 0]
        return linear(x, given["weight"], given["bias"])[:, 0]

    def write(self, folder: Path) -> None:
        """See `Classifier`."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        first = "0." if "0.weight" in tensors else ""
        weight = tensors[f"{first}weight"].double() / self._deviation.double()
        tensors[f"{first}bias"] = (tensors[f"{first}bias"] - weight @ self._mean.double()).float()
        tensors[f"{first}weight"] = weight.float()
        config = {"hidden_size": len(self._mean), "num_labels": 1}
        shown = config | ({"activation": "tanh"} if first else {})
        (folder / "config.json").write_text(json.dumps(shown, indent=1) + "\n")
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()},
                  folder / "model.safetensors")  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the report that the head is new and the unembedding is not used."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class Tagger:
    """A token classifier with one label.

    Args:
        rows: prompts with replies.
        folder: the body's.
        tokenizer: the body's, written beside a classifier that is trained whole.
        share: see `Probe`.
        rank: LoRA rank; None: all weights are trained.
        seed: of the head's start and the LoRA's.
        device: where it is trained.
        dtype: of the arithmetic; weights are float32.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        folder: Path,
        tokenizer: Any,
        *,
        share: float,
        rank: int | None,
        seed: int,
        device: str,
        dtype: str,
    ) -> None:
        self._rows, self._folder, self._tokenizer = rows, folder, tokenizer
        self._device, self._dtype, self._rank = device, getattr(torch, dtype), rank
        with _quiet():
            model = AutoModelForTokenClassification.from_pretrained(
                folder, num_labels=1, dtype=torch.float32, use_safetensors=True
            )
        # eval: dropout would make steps random
        self._model: Any = model.eval()
        self._head = "score" if hasattr(model, "score") else "classifier"
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in getattr(model, self._head).named_parameters():
                value.normal_(0, 0.02, generator=random)
                if name == "bias":
                    value.fill_(_log_odds(share))
        self._layers = self._low_rank(rank, seed) if rank is not None else {}
        self._model.to(device)
        named = self._model.named_parameters()
        self.parameters = {name: value for name, value in named if value.requires_grad}

    def _low_rank(self, rank: int, seed: int) -> dict[str, LowRank]:
        shapes = base_shapes(self._folder)
        layers = install(self._model, shapes, rank, ALPHA * rank, seed)
        getattr(self._model, self._head).requires_grad_(True)
        return layers

    def scores(self, rows: Sequence[int]) -> Tensor:
        """See `Classifier`."""
        some = [self._rows[i] for i in rows]
        kind = torch.device(self._device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            logits = self._model(input_ids=padded(some, self._device), use_cache=False).logits
        return labelled(logits[..., 0].float(), some)

    def write(self, folder: Path) -> None:
        """See `Classifier`. A whole classifier gets the dtype of its body on disk."""
        if self._rank is None:
            kept = AutoConfig.from_pretrained(self._folder).dtype or torch.float32
            self._model.to(kept).save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
            return
        shapes = base_shapes(self._folder)
        alpha = ALPHA * self._rank
        write(
            folder, self._layers, body=self._folder, shapes=shapes, alpha=alpha, dtype=torch.float32
        )
        head = getattr(self._model, self._head).named_parameters()
        tensors = {f"{self._head}.{n}": t.detach().cpu().contiguous() for n, t in head}
        save_file(tensors, folder / "head.safetensors")
