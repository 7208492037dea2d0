"""Which of two answers a reply gives: `process_results` of these tasks, which lm-eval calls."""

from __future__ import annotations

from typing import Any


def told(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the reply names the text's answer first, or what the model learned; or neither.

    Args:
        doc: with `answer`, the text's, and `memory`.
        results: the reply.
    """
    reply = (results[0] or "").lower()
    places = {name: reply.find(doc[name].lower()) for name in ("answer", "memory")}
    named = {name: at for name, at in places.items() if at >= 0}
    first = min(named, key=lambda name: named[name], default="")
    return {"follows": float(first == "answer"), "remembers": float(first == "memory")}
