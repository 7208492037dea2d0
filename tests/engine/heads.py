"""Streams with heads: random checkpoints in the formats that are read, and what each must give.

The expected numbers come from `transformers`' own classes wherever it has one for the format, and
from a full forward over prefix and candidate, without any cache.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from steering.engine_args import StreamSource
from tests.models import make_model
from tests.reference import load, one_thread

Read = Callable[[Sequence[int]], float]
"""Token ids → what the head says after the last of them."""


@dataclass(frozen=True)
class Headed:
    """A stream with a head.

    Args:
        source: for the engine.
        read: the expected number.
        on: the stream whose tokens it reads, if it has no forward of its own.
    """

    source: StreamSource
    read: Read
    on: str | None = None


def classifier(folder: Path, architecture: str, seed: int, *, tokens: bool, labels: int) -> Headed:
    """A checkpoint of `transformers`' token or sequence classifier."""
    make_model(folder, architecture, seed=seed)
    task = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    model = task.from_pretrained(folder, num_labels=labels, dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(seed)
    head = getattr(model, "score", None) or model.classifier
    with torch.no_grad():
        head.weight.normal_(0, head.in_features**-0.5, generator=rng)
        if head.bias is not None:
            head.bias.normal_(0, 0.5, generator=rng)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder)
    # Else `transformers` reads the last token that is no padding, where id 0 is a candidate.
    model.config.pad_token_id = None

    def read(ids: Sequence[int]) -> float:
        logits = _run(model, ids).logits[0]
        last = (logits[-1] if tokens else logits).double()
        return float(last[1] - last[0] if labels == 2 else last[0])

    return Headed(StreamSource(model=str(folder), head="classifier"), read)


def deferring(folder: Path, seed: int, table: int) -> Headed:
    """A Co-LLM checkpoint: the row behind the base's `table` is the defer token."""
    make_model(folder, "llama", seed=seed, vocab_size=table + 1)
    model = load(folder)
    source = StreamSource(model=str(folder), head="classifier")
    return Headed(source, lambda ids: float(_run(model, ids).logits[0, -1, -1]))


def valued(folder: Path, architecture: str, seed: int, port: bool = False) -> Headed:
    """A value model as TRL saves it; `port`: as its later version does, a sequence classifier."""
    if port:
        found = classifier(folder, architecture, seed, tokens=False, labels=1)
        return Headed(StreamSource(model=str(folder), head="value"), found.read)
    make_model(folder, architecture, seed=seed)
    model = load(folder)
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, model.config.hidden_size, generator=rng) / 8
    bias = torch.randn(1, generator=rng)
    file = folder / "model.safetensors"
    tensors = load_file(file) | {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})

    def read(ids: Sequence[int]) -> float:
        return float(weight[0].double() @ last_hidden(model, ids) + bias.double())

    return Headed(StreamSource(model=str(folder), head="value"), read)


def tuned(folder: Path, architecture: str, seed: int) -> Headed:
    """A value model as a PEFT folder: a LoRA of the body and the head, beside the body."""
    make_model(folder / "body", architecture, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "body", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(model, config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=rng)
    adapted.save_pretrained(folder / "tuned")
    weight = torch.randn(1, model.config.hidden_size, generator=rng) / 8
    save_file({"v_head.summary.weight": weight}, folder / "tuned" / "v_head.safetensors")

    def read(ids: Sequence[int]) -> float:
        return float(weight[0].double() @ last_hidden(adapted, ids))

    source = StreamSource(str(folder / "body"), head="value", path=str(folder / "tuned"))
    return Headed(source, read)


def probe(folder: Path, body: Path, on: str, seed: int, hidden: int | None = None) -> Headed:
    """A head alone on a stream's hidden state: linear, or with a hidden layer."""
    folder.mkdir(parents=True)
    model = load(body)
    width = model.config.hidden_size
    rng = torch.Generator().manual_seed(seed)
    sizes = [width, 1] if hidden is None else [width, hidden, 1]
    layers = [
        (torch.randn(b, a, generator=rng) / a**0.5, torch.randn(b, generator=rng) / 2)
        for a, b in itertools.pairwise(sizes)
    ]
    names = [""] if hidden is None else ["0.", "2."]
    tensors: dict[str, torch.Tensor] = {}
    for name, (weight, bias) in zip(names, layers, strict=True):
        tensors |= {f"{name}weight": weight, f"{name}bias": bias}
    save_file(tensors, folder / "model.safetensors")
    config = {"hidden_size": width, "num_labels": 1, "activation": "tanh"}
    (folder / "config.json").write_text(json.dumps(config))

    def read(ids: Sequence[int]) -> float:
        x = last_hidden(model, ids)
        for i, (weight, bias) in enumerate(layers):
            x = weight.double() @ (x.tanh() if i else x) + bias.double()
        return float(x[0])

    return Headed(StreamSource(head="classifier", on=on, path=str(folder)), read, on)


def last_hidden(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[H] float64: the last hidden state after `ids`, behind the last norm."""
    return _run(model, ids, output_hidden_states=True).hidden_states[-1][0, -1].double()


def _run(model: Any, ids: Sequence[int], **options: Any) -> Any:
    with one_thread(), torch.inference_mode():
        return model(torch.tensor([list(ids)]), use_cache=False, **options)
