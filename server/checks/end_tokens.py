"""Which tokens end a stream's own texts, as its files say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.checks.diagnosis import Diagnosis
from steering.plan import BASE
from steering.vocabulary import Overlap


def end_tokens(diagnosis: Diagnosis, tokenizers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By stream, the tokens that end its texts and not the base's, where the base has them too.

    A tuned model ends a turn with a token of its own, which vLLM does not take for an end: it
    knows the base's files only.

    Args:
        diagnosis: of streams that fit.
        tokenizers: of all streams.
    """
    ends = {
        name: _of(fact.checkpoint.folder, tokenizers[name])
        for name, fact in diagnosis.streams.items()
    }
    extra = {}
    for name, wire in diagnosis.overlaps.items():
        shared = Overlap.from_wire(wire).shared
        more = ends[name] - ends[BASE]
        extra[name] = tuple(sorted(i for i in more if 0 <= i < len(shared) and shared[i]))
    return extra


def _of(folder: Path, tokenizer: Any) -> set[int]:
    """The end that `tokenizer` knows, and those of generation_config.json and config.json."""
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ids |= set(value) if isinstance(value, list) else {value}
    return {token_id for token_id in ids if isinstance(token_id, int)}
