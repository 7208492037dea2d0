"""Replies that a critic learns from: sampled ones, or ready ones from a file. Each line of it:

    {"prompt": "…", "completion": "…", "spans": [[start, end], …]}
    {"messages": [{"role": "user", "content": "…"}], "completion": "…", "spans": [[start, end], …]}

`spans` are the critical characters of the completion; they are needed for the rule `data` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.training.critic.classifiers import Row
from adapters.training.critic.spans import Span, check_spans, critical, decode, token_spans
from adapters.training.data import read_lines
from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt, read_prompt
from adapters.training.served import Sample

CONTEXT = 5
"""Ids of the prompt that a reply's text is decoded behind, as in vLLM."""


@dataclass(frozen=True)
class Reply:
    """A reply to a prompt.

    Args:
        where: file and line of the prompt, and which sample it is; for errors.
        given: the prompt's text or messages.
        prompt: its ids.
        ids: the reply's, without the one that ended it.
        text: what they say.
        ended: whether the model ended it, so that an id that is not critical follows.
        before: the ids that `text` follows, see `adapters.training.spans.decode`.
        spans: from the file; None where it has none.
    """

    where: str
    given: str | list[dict[str, str]]
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    ended: bool
    before: tuple[int, ...] = ()
    spans: list[Span] | None = None


def sampled(prompts: Sequence[Prompt], samples: Sequence[Sample], tokenizer: Any) -> list[Reply]:
    """The samples of `adapters.training.served.sample` as replies.

    Raises:
        BadRecipe: the tokenizer reads other text from the ids than the server.
    """
    each = len(samples) // len(prompts)
    found = []
    for i, sample in enumerate(samples):
        prompt = prompts[i // each]
        where = f"{prompt.where}, sample {i % each + 1}"
        ids = sample.reply[:-1] if sample.ended else sample.reply
        before = sample.prompt[-CONTEXT:]
        text = decode(tokenizer, ids, before)
        # A stop string is not in the server's text, and of bytes that are no character it shows
        # fewer than a tokenizer.
        if not _plain(text).startswith(_plain(sample.text)):
            raise BadRecipe(
                f"the body's tokenizer reads {text[:60]!r} from the ids",
                field=where,
                value=sample.text,
                allowed="a body with the served model's tokenizer",
            )
        found.append(Reply(where, prompt.given, sample.prompt, ids, text, sample.ended, before))
    return found


def _plain(text: str) -> str:
    return text.replace("\ufffd", "").lstrip()


def ready(path: Path, tokenizer: Any, template: str | None, *, spans: bool) -> list[Reply]:
    """The replies of a file; the model ended each of them.

    Args:
        path: JSONL.
        tokenizer: the body's.
        template: chat template; None: the tokenizer's own.
        spans: whether each line must have them.

    Raises:
        BadRecipe: it is missing or empty, or a line is not a reply.
    """
    return [_ready(where, e, tokenizer, template, spans) for where, e in read_lines(path)]


def _ready(where: str, entry: Any, tokenizer: Any, template: str | None, spans: bool) -> Reply:
    needed = {"completion", "spans"} if spans else {"completion"}
    if not isinstance(entry, dict) or not needed <= entry.keys():
        raise BadRecipe(
            "not a reply",
            field=where,
            value=sorted(entry) if isinstance(entry, dict) else entry,
            allowed="an object with `prompt` or `messages`, `completion`"
            + (" and `spans`" if spans else ""),
        )
    prompt = read_prompt(
        where, {k: v for k, v in entry.items() if k not in ("completion", "spans")}
    )
    text = entry["completion"]
    if not isinstance(text, str) or not text:
        raise BadRecipe(
            "not a text",
            field=f"{where}: completion",
            value=text,
            allowed="a string that is not empty",
        )
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    prompt_ids = _prompt_ids(prompt, tokenizer, template)
    fitting = [b for b in ((), prompt_ids[-CONTEXT:]) if decode(tokenizer, ids, b) == text]
    if not fitting:
        raise BadRecipe(
            f"the tokenizer makes {decode(tokenizer, ids)!r} of it, where spans mean nothing",
            field=f"{where}: completion",
            value=text,
            allowed="a text that the tokenizer keeps as it is",
        )
    found = check_spans(entry["spans"], text, f"{where}: spans") if "spans" in entry else None
    return Reply(where, prompt.given, prompt_ids, ids, text, True, fitting[0], found)


def _prompt_ids(prompt: Prompt, tokenizer: Any, template: str | None) -> tuple[int, ...]:
    """As the server makes them."""
    if isinstance(prompt.given, str):
        return tuple(tokenizer(prompt.given)["input_ids"])
    if template is None and tokenizer.chat_template is None:
        raise BadRecipe(
            "the body has no chat template",
            field=prompt.where,
            allowed="--chat-template FILE, or prompts without messages",
        )
    try:
        text = tokenizer.apply_chat_template(
            prompt.given, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # Templates raise what they like.
        raise BadRecipe(f"the chat template fails: {error}", field=prompt.where) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_length(reply: Reply, config: Any) -> None:
    """Raises BadRecipe where a body cannot read a reply.

    Args:
        reply: with its prompt.
        config: the body's.
    """
    ids, positions = (*reply.prompt, *reply.ids), getattr(config, "max_position_embeddings", None)
    if positions is not None and len(ids) > positions:
        raise BadRecipe(
            "longer than the body's positions",
            field=reply.where,
            value=f"{len(ids)} tokens",
            allowed=f"≤ {positions}",
        )
    if not reply.prompt or max(ids) >= config.vocab_size:
        raise BadRecipe(
            "an id that the body lacks" if reply.prompt else "the prompt has no token",
            field=reply.where,
            value=max(ids, default=None),
            allowed=f"one id or more, 0 to {config.vocab_size - 1}",
        )


def row(reply: Reply, spans: Sequence[Span], tokenizer: Any) -> Row:
    """A reply with its labels.

    Raises:
        BadRecipe: its tokens cannot be told apart in its text.
    """
    try:
        tokens = token_spans(tokenizer, reply.ids, reply.before)
    except ValueError as error:
        raise BadRecipe(
            f"the tokenizer does not write a text token by token: {error}",
            field=reply.where,
            value=reply.text,
        ) from error
    labels = critical(reply.text, tokens, spans) + [False] * reply.ended
    return Row((*reply.prompt, *reply.ids), len(reply.prompt) - 1, tuple(labels))
