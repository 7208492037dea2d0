"""Trains MeteoRA gates over LoRA adapters, and the adapters with them if asked.

The loss is the paper's (arXiv 2405.13053, section 3.3):

    L = L_LM + λ · mean over all gates of CE(W_gate x, the example's adapter), per token,   λ = 50

Where we differ from the authors' script: examples may be joined into one conversation, so that
gates learn to change in its midst (each token then counts for its own example's adapter), and
adapters may have different ranks and modules.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapters.errors import AdapterError
from adapters.formats.artefact import Artefact
from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from adapters.training import checkpoint
from adapters.training.data import (
    IGNORED,
    Encoder,
    Example,
    content_digest,
    read_examples,
)
from adapters.training.descent import Descent
from adapters.training.errors import BadRecipe
from adapters.training.meteora.pack import write_pack
from adapters.training.meteora.routed import Losses, Routed, install, losses
from adapters.training.meteora.settings import Settings

NO_LIMIT = 1 << 30
"""Rank indices: whether a pack fits a server is that server's question."""


def train(
    settings: Settings, template: str | None = None, say: Callable[[str], None] = print
) -> Artefact:
    """Runs or resumes a training run to its end and writes the pack.

    Args:
        settings: the run.
        template: the chat template; None: the base's own.
        say: takes lines for a person.

    Returns:
        The pack, as `inspect` reads it.

    Raises:
        AdapterError: a setting, an adapter or a line of data cannot be used. Nothing is trained.
    """
    settings.check()
    artefacts, examples = _inputs(settings)
    run = _identity(settings, template, artefacts)
    folder = checkpoint.work_folder(settings.out)
    with checkpoint.locked(folder):
        before = checkpoint.last_run(folder)
        if before is not None:
            checkpoint.check_same(before, run, folder)
            _check_order(before, run)
        if not settings.out.exists():
            encoder = _encoder(settings, template, examples)
            _train(settings, artefacts, examples, encoder, run, folder, say)
        elif before is None:
            _remove(folder)
            raise BadRecipe(
                "there is something already",
                field=f"--out {settings.out}",
                allowed="a folder that does not exist yet",
            )
        _remove(folder)  # Also what a kill after the last rename left.
    return inspect(settings.out, base_shapes(settings.base), max_rank=NO_LIMIT)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _inputs(settings: Settings) -> tuple[list[Artefact], list[list[Example]]]:
    base = base_shapes(settings.base)
    artefacts = []
    for name, folder in settings.adapters.items():
        try:
            found = inspect(folder, base, max_rank=NO_LIMIT)
        except AdapterError as error:
            error.field = f"--adapter {name}: {error.field}"
            raise
        if found.kind != "lora" or not found.plain:
            raise BadRecipe(
                "not a plain LoRA adapter",
                field=f"--adapter {name}",
                value=found.kind,
                allowed="a folder with adapter_config.json",
            )
        artefacts.append(found)
    examples = [read_examples(settings.data[name]) for name in settings.adapters]
    if settings.turns > 1:
        for example in (e for some in examples for e in some if not e.messages):
            raise BadRecipe(
                "a prompt with its completion cannot be joined to others",
                field=example.where,
                allowed="messages, or --turns 1",
            )
    return artefacts, examples


def _encoder(settings: Settings, template: str | None, examples: list[list[Example]]) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    if not tokenizer.is_fast:
        raise BadRecipe("a fast tokenizer is needed", field=str(settings.base))
    has_messages = any(e.messages for some in examples for e in some)
    if has_messages and template is None and tokenizer.chat_template is None:
        raise BadRecipe(
            "the base has no chat template",
            field=str(settings.base),
            allowed="--chat-template FILE, or prompt and completion",
        )
    positions = AutoConfig.from_pretrained(settings.base).max_position_embeddings
    longest = min(1024, positions) if settings.max_tokens is None else settings.max_tokens
    if longest > positions:
        raise BadRecipe(
            "more than the base's positions",
            field="--max-tokens",
            value=longest,
            allowed=f"≤ {positions}",
        )
    encoder = Encoder(tokenizer, template, longest)
    for some in examples:
        for example in some:
            encoder.check(example, examples[0][0] if settings.turns > 1 else None)
    return encoder


def _identity(
    settings: Settings, template: str | None, artefacts: list[Artefact]
) -> dict[str, Any]:
    """What two runs must share to be one; JSON values."""
    names = settings.adapters
    return {
        "settings": settings.deciding(),
        "base": content_digest(settings.base / "config.json"),
        "template": template,
        "adapters": {n: a.digest() for n, a in zip(names, artefacts, strict=True)},
        "data": {n: content_digest(settings.data[n]) for n in names},
    }


def _check_order(before: dict[str, Any], run: dict[str, Any]) -> None:
    if list(before["adapters"]) != list(run["adapters"]):
        raise BadRecipe(
            "in another order than the unfinished run",
            field="--adapter",
            value=list(run["adapters"]),
            allowed=str(list(before["adapters"])),
        )


def _train(
    settings: Settings,
    artefacts: list[Artefact],
    examples: list[list[Example]],
    encoder: Encoder,
    run: dict[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    model, layers = _model(settings, artefacts)
    parameters = _trained(layers, settings.adapters_rate is not None)

    def steps(start: int) -> Iterator[tuple[float, str]]:
        for step in range(start, settings.steps):
            rows = [t.to(settings.device) for t in _batch(settings, step, examples, encoder)]
            found = _losses(settings, model, layers, rows)
            yield float(found.language + found.gates), _shown(settings, found)

    Descent(
        "meteora",
        parameters,
        _peaks(settings, parameters),
        settings.steps,
        settings.warm_up,
        settings.weight_decay,
        settings.save_every,
        advice="a lower one, of the adapters too",
    ).run(run, folder, say, steps)
    part = folder / "pack"
    write_pack(part, settings, artefacts, layers)
    inspect(part, base_shapes(settings.base), max_rank=NO_LIMIT)
    checkpoint.publish(part, settings.out)


def _shown(settings: Settings, found: Losses) -> str:
    parts = f"{found.language:.3f} + {settings.gate_factor:g} × {found.gates:.3f}"
    return f"loss {parts}, gates right for {found.hit:.1%} of the tokens"


def _losses(
    settings: Settings, model: Any, layers: dict[str, Routed], rows: Sequence[Tensor]
) -> Losses:
    """The losses of a step, detached; adds their gradients."""
    kind = torch.device(settings.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        ids, labels, members = rows
        found = losses(model, layers, ids, labels, members, IGNORED)
    (found.language + settings.gate_factor * found.gates).backward()
    return Losses(found.language.detach(), found.gates.detach(), found.hit)


def _model(settings: Settings, artefacts: list[Artefact]) -> tuple[Any, dict[str, Routed]]:
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.base, dtype=dtype, use_safetensors=True)
    layers = install(model, artefacts, settings.top_k, settings.gate_std, settings.seed)
    return model.to(settings.device).eval(), layers  # eval: dropout would make steps random


def _trained(layers: dict[str, Routed], adapters: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {f"{name}.gate": layer.gate for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.a.requires_grad_(adapters)
        layer.b.requires_grad_(adapters)
        if adapters:
            found |= {f"{name}.a": layer.a, f"{name}.b": layer.b}
    return found


def _peaks(settings: Settings, parameters: dict[str, Tensor]) -> list[tuple[list[Tensor], float]]:
    gates = [value for name, value in parameters.items() if name.endswith(".gate")]
    if settings.adapters_rate is None:
        return [(gates, settings.rate)]
    others = [value for name, value in parameters.items() if not name.endswith(".gate")]
    return [(gates, settings.rate), (others, settings.adapters_rate)]


def _batch(
    settings: Settings, step: int, examples: list[list[Example]], encoder: Encoder
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and members of a step, each [rows, T] int64; a function of seed and step alone.

    All rows of a step have as many examples, so that little is padding. Adapters are drawn with
    equal chances, whatever the sizes of their files.
    """
    draw = random.Random(f"{settings.seed} {step}")
    turns = draw.randint(1, min(settings.turns, settings.batch))
    rows = []
    for _ in range(settings.batch // turns):
        members = [draw.randrange(len(examples)) for _ in range(turns)]
        rows.append(encoder.row([(m, draw.choice(examples[m])) for m in members]))
    length = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([v + [filler] * (length - len(v)) for v in values])

    return (
        padded([row.ids for row in rows], 0),
        padded([row.labels for row in rows], IGNORED),
        padded([row.members for row in rows], IGNORED),
    )
