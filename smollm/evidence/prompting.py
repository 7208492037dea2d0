"""Asks for a form by prompts, and chooses the best prompt on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smollm.evidence.asking import CHAT, Reply, replies
from smollm.evidence.claim import Share, Table
from smollm.evidence.purposes import PROMPTS, Item, Prompt, Purpose

LONGEST = 56
"""Tokens of a reply; one that has not ended by then is hardly ever right."""


@dataclass(frozen=True)
class Wanted:
    """What replies shall be like.

    Args:
        title: for tables.
        purposes: whose forms, all at once.
        shots: questions with right replies, from the training split.
        right: whether a reply to an item is right.
    """

    title: str
    purposes: tuple[Purpose, ...]
    shots: tuple[tuple[str, str], ...]
    right: Callable[[str, Item], bool]

    @classmethod
    def of(cls, purpose: Purpose, train: Sequence[Item]) -> Wanted:
        """One purpose; every fifth item is shown, so that topics differ."""
        shots = tuple((item.question, purpose.form(item)) for item in train[::5])
        return cls(purpose.name, (purpose,), shots, purpose.right)

    def share(self, found: Sequence[Reply], items: Sequence[Item]) -> Share:
        """The share of right replies."""
        return Share.over(self.right(r.text, i) for r, i in zip(found, items, strict=True))


def prompted(url: str, prompt: Prompt, wanted: Wanted, items: Sequence[Item]) -> list[Reply]:
    """The plain base's greedy replies to a prompt."""
    return asked(url, [prompt.messages(wanted.purposes, wanted.shots, i.question) for i in items])


def asked(url: str, conversations: Sequence[Any], **more: Any) -> list[Reply]:
    """Greedy replies to conversations; `more` goes into every request."""
    return replies(
        url, CHAT, [{"messages": m, "max_tokens": LONGEST, **more} for m in conversations]
    )


def plainly(url: str, items: Sequence[Item], **more: Any) -> list[Reply]:
    """Greedy replies to the questions alone; `more` goes into every request."""
    return asked(url, [[{"role": "user", "content": i.question}] for i in items], **more)


def best_prompt(url: str, wanted: Wanted, items: Sequence[Item]) -> tuple[Prompt, Table]:
    """The prompt with most right replies, of those the first, and what each reached.

    Args:
        url: of the server.
        wanted: see there.
        items: the validation split.
    """
    found = [(prompt, wanted.share(prompted(url, prompt, wanted, items), items))
             for prompt in PROMPTS]  # fmt: skip
    best, _ = max(found, key=lambda one: one[1].value)
    table = Table(
        f"Prompts for {wanted.title}, on the validation split",
        ("prompt", "right"),
        tuple((prompt.name, share) for prompt, share in found),
        f"Chosen: {best.name}.",
    )
    return best, table
