"""Why the engine ended a request with an error: said by the scheduler, read by the front end.

Travels as vLLM's `stop_reason` beside the finish reason "error". Loads neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_NUMBERS = "gives scores that are NaN or infinite"

NOTHING_LEFT = "The request's constraints leave no token that could be drawn."
"""Say, a grammar and `allowed_token_ids` that have no token in common."""

NO_TEXT = "the grammar allows no text at all"

_GRAMMAR = "The grammar cannot be used: "


def of_streams(names: Sequence[str]) -> str:
    """Streams and heads that give no numbers."""
    which = f"The stream {names[0]!r}"
    if len(names) > 1:
        which = f"Of the streams {', '.join(map(repr, names))} at least one"
    return (
        f"{which} {NO_NUMBERS}: its checkpoint is damaged, or its numbers overflow in this dtype."
    )


def of_grammar(why: object) -> str:
    """A grammar that the backend refuses."""
    return f"{_GRAMMAR}{why}"


def fault_of_caller(reason: str) -> str | None:
    """The request's field that is at fault; '' for several; None if the caller did nothing wrong.

    Args:
        reason: one of the above.
    """
    if reason.startswith(_GRAMMAR):
        return "structured_outputs"
    return "" if reason == NOTHING_LEFT else None
