"""Which of two answers a reply gives: `process_results` of these tasks, which lm-eval calls."""

from __future__ import annotations

import re
from typing import Any


def told(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the reply names the text's answer first, or what the model learned; or neither.

    Args:
        doc: with `answer`, the text's, and `memory`.
        results: the reply.
    """
    named = {name: _place(doc[name], results[0] or "") for name in ("answer", "memory")}
    first = min(named, key=lambda name: named[name])
    found = first if named[first] < _NOWHERE else ""
    return {"follows": float(found == "answer"), "remembers": float(found == "memory")}


_NOWHERE = 1 << 30


def _place(words: str, text: str) -> int:
    """Where whole words begin in a text, in whatever case; `German` is not in `Germany`."""
    found = re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)
    return found.start() if found else _NOWHERE
