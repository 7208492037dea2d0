"""Prompts to sample from: a JSONL file, each line in one of two forms.

{"prompt": "…"}                                          → /v1/completions
{"messages": [{"role": "user", "content": "…"}]}         → /v1/chat/completions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.training.data import read_lines, read_messages
from adapters.training.errors import BadRecipe


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        where: file and line, for errors.
        body: `{"prompt": text}` or `{"messages": [...]}`.
    """

    where: str
    body: Mapping[str, Any]

    @property
    def given(self) -> str | list[dict[str, str]]:
        """The text or the messages."""
        found: str | list[dict[str, str]] = next(iter(self.body.values()))
        return found


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        BadRecipe: it is missing or empty, or a line is not a prompt.
    """
    return [read_prompt(where, entry) for where, entry in read_lines(path)]


def read_prompt(where: str, entry: Any) -> Prompt:
    """The prompt of a line; raises BadRecipe where it is none."""
    keys = sorted(entry) if isinstance(entry, dict) else None
    if keys == ["prompt"]:
        if not isinstance(entry["prompt"], str) or not entry["prompt"]:
            raise BadRecipe(
                "not a text",
                field=f"{where}: prompt",
                value=entry["prompt"],
                allowed="a string that is not empty",
            )
        return Prompt(where, {"prompt": entry["prompt"]})
    if keys == ["messages"]:
        messages = read_messages(where, entry["messages"])
        if not messages or messages[-1]["role"] == "assistant":
            raise BadRecipe(
                "leaves nothing to reply to",
                field=f"{where}: messages",
                allowed="a last message that is not the assistant's",
            )
        return Prompt(where, {"messages": list(messages)})
    raise BadRecipe(
        "not a prompt",
        field=where,
        value=keys or entry,
        allowed="an object with `prompt` or with `messages`, and nothing else",
    )
