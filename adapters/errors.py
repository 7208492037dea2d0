"""Errors of the adapter layer.

    AdapterError
    ├── the artefact's fault
    │   ├── BadAdapter   the files are broken, unsafe or of a kind that is not served    → 422
    │   │   └── TooLarge more bytes or files than this server takes                      → 413
    │   └── DoesNotFit   sound files, but for another base, or too large for this server → 422
    ├── the caller's fault
    │   ├── BadSource    a source that is not allowed, or not written as one             → 400
    │   ├── NoAdapter    no adapter of this name                                         → 404
    │   └── Conflict     the name is taken, or the state forbids it                      → 409
    └── nobody's fault here
        ├── SourceAway   the source does not answer; trying again may help               → 503
        ├── FilesLost    stored files are gone or changed, and cannot be had again       → 503
        ├── StoreFull    no room for the files                                           → 507
        ├── NoRoom       no room in the engine                                           → 503
        └── RegistryAway Redis does not answer, or speaks another schema                 → 503

Errors of the steering layer have the same shape, `Fault`.
"""

from __future__ import annotations


class Fault(Exception):
    """A fault that a person can mend: says where it is, what was found and what is allowed.

    Args:
        message: one sentence for a person.
        field: where the fault is: the dotted path of a request's or a setting's field, or
            `<file>`, `<file>: <tensor>`, `<file>: <key>`; empty: the message says it all.
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


class AdapterError(Fault):
    """A fault of an artefact, a request or a place that adapters come from."""


class BadAdapter(AdapterError):
    """Files that are broken, unsafe, or use a feature that is not served."""


class TooLarge(BadAdapter):
    """More bytes or files than this server takes."""


class DoesNotFit(AdapterError):
    """An adapter that does not fit the base model or this server's limits."""


class BadSource(AdapterError):
    """A source that this server does not load from, or that is not written as one."""


class NoAdapter(AdapterError):
    """No adapter of this name (or of this version) is known."""


class Conflict(AdapterError):
    """The name is taken by other content, or the adapter's state does not allow the change."""


class SourceAway(AdapterError):
    """The source did not answer, broke off or was too slow."""


class FilesLost(AdapterError):
    """Files in the store were changed or are gone, and could not be fetched again."""


class StoreFull(AdapterError):
    """The store's disk is full; it holds what it held before."""


class NoRoom(AdapterError):
    """The engine holds as many adapters as it may, or one is larger than all of its room."""


class RegistryAway(AdapterError):
    """Redis does not answer, or its registry has another schema version."""
