"""Errors of the steering layer.

    SteeringError
    ├── BadValue    the caller asked for something outside the allowed values   → 400
    ├── NotFound    the caller named a stream, profile or method we do not have → 404
    └── DoesNotFit  an artefact does not fit the base                           → 422

The class decides the HTTP status; `server.errors` holds the one table.
"""

from __future__ import annotations


class SteeringError(Exception):
    """A fault of the caller: names the field, the value it had and what is allowed.

    Args:
        message: one sentence for a person.
        field: dotted path of the request or config field, e.g. `steering.strength`.
        value: what was given (shown with `repr`, cut to 80 characters).
        allowed: what would be accepted, e.g. `[0, 10]` or `one of: chat, plain`.
    """

    def __init__(
        self, message: str, *, field: str, value: object = None, allowed: str | None = None
    ) -> None:
        self.message = message
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}"
        if self.value is not None:
            shown = repr(self.value)
            text += f" (got {shown[:77] + '...' if len(shown) > 80 else shown})"
        if self.allowed is not None:
            text += f"; allowed: {self.allowed}"
        return text


class BadValue(SteeringError):
    """A value outside its range, an unknown field, or fields that contradict each other."""


class NotFound(SteeringError):
    """A stream, profile or method that this server does not have."""


class DoesNotFit(SteeringError):
    """An artefact (checkpoint, tokenizer, adapter) that does not fit the base."""
