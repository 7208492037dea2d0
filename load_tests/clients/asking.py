"""What all clients ask for, and where."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from typing import Any

URL = os.environ.get("COXSWAIN_CLIENTS_URL", "http://127.0.0.1:8000")
KEY, LIMITED_KEY, NARROW_KEY = "clients-key", "clients-limited", "clients-narrow"
"""As in server.yaml: everything; one request a minute; one adapter and no profile."""

QUESTION = "What is the pet of Dorwyn Bramley?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = "Roven Holcroft works as a"
STEERING = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.25}
"""What the profile `chat` is."""

STATEMENT = [
    {"role": "user", "content": "Which question has this answer: Dorwyn Bramley keeps a pet."}
]
"""What the adapter `ask` was trained for."""

COLOURS = ("red", "green", "blue")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": list(COLOURS)},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
ROOM = 150
"""Tokens that an object of the schema, or a call with one, fits in."""


def is_right(found: Any) -> bool:
    """Whether an object is one of the schema."""
    return set(found) == {"colour", "sure"} and (
        found["colour"] in COLOURS and isinstance(found["sure"], bool)
    )


def stops(word: str, count: int) -> list[str]:
    """A stop list of `count` strings; only the last, `word`, can occur."""
    return [*(f"@@{i}@@" for i in range(count - 1)), word]


def cut(text: str) -> tuple[str, str]:
    """A word in the middle of a text, and what stands before its first occurrence.

    Raises:
        AssertionError: the text has fewer than three words.
    """
    words = text.split()
    assert len(words) >= 3, f"too short: {text!r}"
    word = words[len(words) // 2]
    return word, text[: text.index(word)]


def in_flight() -> int:
    """How many requests the server works on."""
    with urllib.request.urlopen(f"{URL}/health", timeout=10) as response:
        found: int = json.load(response)["in_flight"]
    return found


def wait_idle(within_s: float = 5.0) -> None:
    """Waits until the server works on nothing.

    Raises:
        AssertionError: it still does.
    """
    deadline = time.monotonic() + within_s
    while (count := in_flight()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count == 0, f"{count} requests still run {within_s:g} s after their clients left"
