"""Errors of the adapter layer.

    AdapterError
    ├── BadSource     a name or a place that we do not take                             → 400
    ├── NotFound      no adapter of that name                                           → 404
    ├── Conflict      it exists with another content, or its state does not allow this  → 409
    ├── BadAdapter    the files are broken, unsafe or of a kind that is not served      → 422
    ├── DoesNotFit    sound files, but for another base, or too large for this server   → 422
    └── RegistryAway  our fault: the registry does not answer                           → 503

The fields are those of `steering.errors.SteeringError`, which this layer must not import.
"""

from __future__ import annotations


class AdapterError(Exception):
    """What went wrong with an adapter, where, what was found and what is allowed.

    Args:
        message: one sentence for a person.
        field: where the fault is: a request's field, `<file>`, `<file>: <tensor>` or
            `<file>: <key>`.
        value: what was found (shown with `repr`, cut to 80 characters).
        allowed: what would be accepted.
    """

    def __init__(
        self, message: str, *, field: str = "", value: object = None, allowed: str | None = None
    ) -> None:
        self.message = message
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        if self.value is not None:
            shown = repr(self.value)
            text += f" (got {shown[:77] + '...' if len(shown) > 80 else shown})"
        if self.allowed is not None:
            text += f"; allowed: {self.allowed}"
        return text


class BadSource(AdapterError):
    """A name or a source that is not allowed or does not exist."""


class NotFound(AdapterError):
    """An adapter that this server does not have."""


class Conflict(AdapterError):
    """The name is taken by another content, or the adapter's state does not allow this."""


class BadAdapter(AdapterError):
    """Files that are broken, unsafe, or use a feature that is not served."""


class DoesNotFit(AdapterError):
    """An adapter that does not fit the base model or this server's limits."""


class RegistryAway(AdapterError):
    """The registry does not answer, or holds what we cannot read."""
