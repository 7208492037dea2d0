"""Training examples: JSONL files, and the tokens that they become.

Each line is one example of what an adapter is for, in one of two forms:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}

Messages are written with the base's chat template. All tokens count in the gates' loss; only the
assistant's replies, or the completion, count in the language model's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.training.errors import BadRecipe

_ROLES = ("system", "user", "assistant", "tool")
IGNORED = -100
"""Label of a token that does not count, as in torch."""


@dataclass(frozen=True)
class Example:
    """One line of a file: either messages or a prompt with its completion.

    Args:
        where: file and line, for errors.
        messages: role and content.
        prompt: text.
        completion: text; the end token is put behind it.
    """

    where: str
    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    completion: str = ""


def read_examples(path: Path) -> list[Example]:
    """The examples of one file.

    Raises:
        BadRecipe: it is missing or empty, or a line is not an example.
    """
    return [_example(where, entry) for where, entry in read_lines(path)]


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """(file and line, JSON value) of each line of a JSONL file that is not blank.

    Raises:
        BadRecipe: it is missing or empty, or a line is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"cannot be read: {error}", field=str(path)) from error
    found = []
    # Not `splitlines`: JSON may hold what Unicode calls line ends.
    for i, line in enumerate(text.split("\n"), 1):
        where = f"{path.name}:{i}"
        try:
            if line.strip():
                found.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise BadRecipe(f"not JSON: {error}", field=where) from error
    if not found:
        raise BadRecipe("has no examples", field=str(path))
    return found


def content_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _example(where: str, entry: Any) -> Example:
    keys = sorted(entry) if isinstance(entry, dict) else None
    if keys == ["messages"]:
        messages = read_messages(where, entry["messages"])
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRecipe(
                "has no reply to learn",
                field=f"{where}: messages",
                allowed="a last message of the assistant",
            )
        return Example(where, messages=messages)
    if keys == ["completion", "prompt"]:
        for key in ("prompt", "completion"):
            if not isinstance(entry[key], str) or not entry[key]:
                raise BadRecipe(
                    "not a text",
                    field=f"{where}: {key}",
                    value=entry[key],
                    allowed="a string that is not empty",
                )
        return Example(where, prompt=entry["prompt"], completion=entry["completion"])
    raise BadRecipe(
        "not an example",
        field=where,
        value=keys or entry,
        allowed="an object with `messages`, or with `prompt` and `completion`",
    )


def read_messages(where: str, value: Any) -> tuple[dict[str, str], ...]:
    """The messages of a conversation.

    Raises:
        BadRecipe: they are not a list of objects with `role` and `content`.
    """
    if not isinstance(value, list):
        raise BadRecipe("not a list", field=f"{where}: messages", value=value)
    for i, message in enumerate(value):
        field = f"{where}: messages[{i}]"
        if not isinstance(message, dict) or sorted(message) != ["content", "role"]:
            raise BadRecipe(
                "not a message",
                field=field,
                value=message,
                allowed="an object with `role` and `content`",
            )
        if message["role"] not in _ROLES:
            raise BadRecipe(
                "unknown role",
                field=f"{field}.role",
                value=message["role"],
                allowed=", ".join(_ROLES),
            )
        if not isinstance(message["content"], str):
            raise BadRecipe("not a text", field=f"{field}.content", value=message["content"])
    return tuple(value)


@dataclass(frozen=True)
class Tokens:
    """One row of a batch.

    Args:
        ids: token ids.
        labels: the same, `IGNORED` where the language model's loss does not count.
        members: per token the index of the adapter that it is for.
    """

    ids: list[int]
    labels: list[int]
    members: list[int]


class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: the base's, a fast one (character offsets are needed).
        template: chat template; None: the tokenizer's own.
        longest: tokens that a row may have.
    """

    def __init__(self, tokenizer: Any, template: str | None, longest: int) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.longest = longest

    def check(self, example: Example, after: Example | None = None) -> None:
        """Raises BadRecipe where an example alone cannot be a row, or not behind another one."""
        tokens = self.row([(0, example)])
        if len(tokens.ids) > self.longest:
            raise BadRecipe(
                "too long",
                field=example.where,
                value=f"{len(tokens.ids)} tokens",
                allowed=f"≤ {self.longest} (--max-tokens)",
            )
        if all(label == IGNORED for label in tokens.labels[1:]):
            raise BadRecipe("no token of its reply is left to learn", field=example.where)
        if after is not None:
            self._row([(0, after), (0, example)])  # Templates may refuse, say, a second system.

    def row(self, parts: Sequence[tuple[int, Example]]) -> Tokens:
        """The tokens of (member, example) pairs joined into one conversation.

        Parts that would make the row longer than `longest` are left out, the first never.
        """
        found = self._row(parts)
        while len(found.ids) > self.longest and len(parts) > 1:
            parts = parts[:-1]
            found = self._row(parts)
        return found

    def _row(self, parts: Sequence[tuple[int, Example]]) -> Tokens:
        if not parts[0][1].messages:
            (member, example), *_ = parts
            text = example.prompt + example.completion + (self.tokenizer.eos_token or "")
            start = len(example.prompt)
            spans = [(0, start, False, member), (start, len(text), True, member)]
            return self._tokens(text, spans, special=True)
        text, spans = "", []
        messages: list[dict[str, str]] = []
        for member, example in parts:
            for message in example.messages:
                start = len(text)
                if message["role"] == "assistant":
                    start = len(self._render(messages, True, example, text))
                    spans.append((len(text), start, False, member))
                messages.append(message)
                text = self._render(messages, False, example, text)
                spans.append((start, len(text), message["role"] == "assistant", member))
        return self._tokens(text, spans, special=False)

    def _render(
        self, messages: list[dict[str, str]], prompting: bool, example: Example, before: str
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                add_generation_prompt=prompting,
                tokenize=False,
            )
        except Exception as error:  # Templates raise what they like.
            raise BadRecipe(f"the chat template fails: {error}", field=example.where) from error
        if not text.startswith(before):
            raise BadRecipe(
                "the chat template rewrites earlier messages, so replies cannot be told apart",
                field=example.where,
                allowed="prompt and completion, or another --chat-template",
            )
        return text

    def _tokens(
        self, text: str, spans: list[tuple[int, int, bool, int]], *, special: bool
    ) -> Tokens:
        """A token belongs to the span that holds its last character.

        Its last, because a space before a word belongs to the token of the word.
        """
        coded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        ids, labels, members, at = list(coded["input_ids"]), [], [], 0
        for token, (_, stop) in zip(ids, coded["offset_mapping"], strict=True):
            while at < len(spans) - 1 and stop > spans[at][1]:
                at += 1
            labels.append(token if spans[at][2] else IGNORED)
            members.append(spans[at][3])
        return Tokens(ids, labels, members)
