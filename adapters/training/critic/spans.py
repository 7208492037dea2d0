"""Spans: which characters of a reply are critical, and which of its tokens that makes critical.

A span [start, end) counts characters of the reply. Token t of a reply is critical if its
characters overlap a span. White space at a token's start does not count, as byte-level BPE puts
the space before a word into the word's token; a token of nothing but white space counts whole.
A token that holds only some bytes of a character has that character. (Of U+FFFD, which also stands
for bytes that are no character, only its first token has it.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from adapters.training.errors import BadRecipe

Span = tuple[int, int]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+|(?<=\d)[.,:/](?=\d)[^\W_]+)*")
_FIRST_PERSON = re.compile(r"I(?:['’].*)?")
_OPENING = " \t\"'“‘«([{*_"
_ENDING = ".!?…\n"


def names(text: str) -> list[Span]:
    """The built-in rule: numbers, and capitalised words that do not begin a sentence.

    A number is a word with a digit in it ("7", "1,846.5", "12:30", "3rd", "B2"), wherever it
    stands. A capitalised word counts unless it begins the text or a sentence (after `.`, `!`,
    `?`, `…` or a new line, brackets and quotation marks left out) or is "I". Words that count and
    have only spaces between them are one span: "Marie Curie", "Apollo 11".
    """
    found: list[Span] = []
    for word in _WORD.finditer(text):
        shown = word.group()
        number = any(c.isdigit() for c in shown)
        name = shown[0].isupper() and not _FIRST_PERSON.fullmatch(shown)
        if not number and not (name and not _begins(text, word.start())):
            continue
        if found and not text[found[-1][1] : word.start()].strip(" "):
            found[-1] = (found[-1][0], word.end())
        else:
            found.append((word.start(), word.end()))
    return found


def _begins(text: str, at: int) -> bool:
    before = text[:at].rstrip(_OPENING)
    return not before or before[-1] in _ENDING


def check_spans(found: Any, text: str, field: str) -> list[Span]:
    """Spans as a rule or a file gives them.

    Args:
        found: should be [[start, end], …].
        text: the reply.
        field: where it comes from, for the error.

    Raises:
        BadRecipe: it is something else, or a span is empty or leaves the reply.
    """
    if not isinstance(found, list | tuple):
        raise BadRecipe("not spans", field=field, value=found, allowed="[[start, end], …]")
    spans = []
    for i, span in enumerate(found):
        if not (isinstance(span, list | tuple) and len(span) == 2 and all(map(_whole, span))):
            raise BadRecipe(
                "not a span",
                field=f"{field}[{i}]",
                value=span,
                allowed="[start, end], two integers",
            )
        start, end = map(int, span)
        if not 0 <= start < end <= len(text):
            raise BadRecipe(
                "not in the reply",
                field=f"{field}[{i}]",
                value=span,
                allowed=f"0 ≤ start < end ≤ {len(text)}, the reply's characters",
            )
        spans.append((start, end))
    return spans


def _whole(number: Any) -> bool:
    # Integers of numpy come out of a function's process as floats.
    return type(number) is int or (type(number) is float and number.is_integer())


def decode(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """The text of a reply's ids, as the server shows it: without special tokens.

    Args:
        tokenizer: a fast one.
        ids: the reply's.
        before: ids that it follows. Some tokenizers write a token differently at a text's start.
    """

    def text(some: Sequence[int]) -> str:
        found: str = tokenizer.decode(
            list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found

    return text([*before, *ids])[len(text(before)) :]


def token_spans(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[Span]:
    """The characters of `decode(tokenizer, ids, before)` that each token holds some bytes of.

    Found by decoding the tokens one after the other, each behind the ones before it.

    Raises:
        ValueError: the tokenizer's text does not grow token by token.
    """
    text = decode(tokenizer, ids, before)
    found: list[Span] = []
    # `context` are whole characters, and end at character `at`; ids from `done` on come next.
    context, done, at, begin = before, 0, 0, 0
    for t in range(len(ids)):
        news = decode(tokenizer, ids[done : t + 1], context)
        same = _common(news, text[at : at + len(news)])
        whole = same == len(news)
        found.append((begin, at + same + (not whole)))
        begin = at + same
        if whole and news:
            context, done, at = ids[done : t + 1], t + 1, begin
    if begin != len(text):
        raise ValueError(f"its tokens give {text[:begin]!r}")
    return found


def _common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)))  # fmt: skip


def critical(text: str, tokens: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens are critical.

    Args:
        text: the reply.
        tokens: from `token_spans`.
        spans: the critical ones.
    """
    return [_overlaps(_visible(text, token), spans) for token in tokens]


def _visible(text: str, token: Span) -> Span:
    start, end = token
    shown = text[start:end].lstrip()
    return (end - len(shown), end) if shown else token


def _overlaps(token: Span, spans: Sequence[Span]) -> bool:
    return token[0] < token[1] and any(s < token[1] and token[0] < e for s, e in spans)
