"""Whether a body can learn values of what a server says: before it is asked, and after."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from adapters.errors import BadAdapter
from adapters.formats.base import base_shapes
from adapters.training.client import ask
from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt
from adapters.training.served import Sample, Served, check

_COMPARED = 16
"""Prompts whose tokens are compared."""


def check_body(folder: Path) -> None:
    """Raises BadRecipe where a folder holds no language model that reads from left to right."""
    field = f"--body {folder}"
    if not (folder / "config.json").is_file():
        raise BadRecipe("no model here", field=field, allowed="a folder with config.json")
    try:
        base_shapes(folder)
    except BadAdapter as error:
        raise BadRecipe(str(error), field=field, allowed="a folder with safetensors") from error
    kind = (AutoConfig.from_pretrained(folder).architectures or [""])[0]
    if not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise BadRecipe("no language model", field=field, value=kind, allowed="…ForCausalLM")
    _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    try:
        found: Any = AutoTokenizer.from_pretrained(folder)
        if len(found) < 2:  # Where there are no files, some classes make one of nothing.
            raise ValueError("no tokenizer files")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        field = f"--body {folder}"
        raise BadRecipe(f"its tokenizer cannot be read: {reason}", field=field) from error
    return found


def check_server(served: Served, prompts: Sequence[Prompt], body: Path) -> None:
    """Raises BadRecipe where a server cannot be asked, or has other tokens than the body."""
    check(served)
    tokenizer = _tokenizer(body)

    async def tokens(some: Sequence[Prompt]) -> list[Any]:
        fields: dict[str, Any] = {"return_token_strs": True}
        if served.model is not None:
            fields["model"] = served.model
        async with served.peer.client() as client:
            return [
                await ask(client, served.peer, "POST", "/tokenize", {**p.body, **fields}, p.where)
                for p in some
            ]

    for prompt, found in zip(prompts, asyncio.run(tokens(prompts[:_COMPARED])), strict=False):
        ours = tokenizer.convert_ids_to_tokens(found["tokens"])
        for id_, theirs, own in zip(found["tokens"], found["token_strs"], ours, strict=True):
            if theirs != own:
                raise BadRecipe(
                    f"its tokenizer has {own!r} as id {id_}, the served model {theirs!r} "
                    f"(in {prompt.where})",
                    field=f"--body {body}",
                    allowed="a body with the served model's tokenizer",
                )


def check_samples(body: Path, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
    """Raises BadRecipe for the first sample that a body cannot read."""
    config = AutoConfig.from_pretrained(body)
    positions = getattr(config, "max_position_embeddings", None)
    each = len(samples) // len(prompts)
    for i, one in enumerate(samples):
        where = f"{prompts[i // each].where}, sample {i % each + 1}"
        ids = (*one.prompt, *one.reply)
        if (highest := max(ids)) >= config.vocab_size:
            raise BadRecipe(
                "an id that the body lacks",
                field=where,
                value=highest,
                allowed=f"< {config.vocab_size}; a body with the served model's tokenizer",
            )
        if positions is not None and len(ids) > positions:
            raise BadRecipe(
                "longer than the body's positions",
                field=where,
                value=f"{len(ids)} tokens",
                allowed=f"≤ {positions}",
            )
