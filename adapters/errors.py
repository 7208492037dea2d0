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
    ├── the source's fault
    │   └── SourceAway   the source does not answer; trying again may help               → 503
    └── ServerFault      the server's fault: never held against the artefact             → 500
        ├── FilesLost    stored files are gone or changed, and cannot be had again       → 503
        ├── StoreFull    no room for the files                                           → 507
        ├── NoRoom       no room or no memory in the engine                              → 503
        ├── EngineAway   the engine did not answer in time, or has ended                 → 503
        └── RegistryAway Redis does not answer, or speaks another schema                 → 503

Errors of the steering layer have the same shape, `Fault`.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import Any, ClassVar, Literal

_LONGEST_FIELD, _LONGEST_ALLOWED = 200, 600
"""Letters in a message: names of tensors and modules come from files of strangers."""


class _Short(reprlib.Repr):
    """`repr` that costs little for deep, huge and self-referring values.

    What it leaves is cut once more, so the limits matter to what is larger than 80 letters only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 40
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, _level: int) -> str:
        """Python refuses to write more than 4300 digits, and takes long for fewer."""
        return str(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In the order in which it was written."""
        if x and level <= 0:
            return "{...}"
        first = islice(x.items(), self.maxdict)
        items = (f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in first)
        return "{" + ", ".join(items) + "}"


_short = _Short()


def _sendable(text: str) -> str:
    """The text without lone surrogates, which neither JSON answers nor the registry can carry."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


class Fault(Exception):
    """An error that a person can repair: it names the place, the value and the allowed range.

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
        self.field = _cut(_sendable(field), _LONGEST_FIELD)
        self.value = value
        self.allowed = allowed
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        if self.value is not None:
            value_text = _short.repr(self.value)
            text += f" (got {_cut(value_text, 80)})"
        if self.allowed is not None:
            text += f"; allowed: {_cut(self.allowed, _LONGEST_ALLOWED)}"
        return _sendable(text)


Whose = Literal["adapter", "caller", "source", "server"]


class AdapterError(Fault):
    """A fault of an artefact, a request or a place that adapters come from."""

    whose: ClassVar[Whose] = "adapter"
    """Who caused it. Faults of the source and of the server may pass: trying again may help."""


class BadAdapter(AdapterError):
    """Files that are broken, unsafe, or use a feature that is not served."""


class TooLarge(BadAdapter):
    """More bytes or files than this server takes."""


class DoesNotFit(AdapterError):
    """An adapter that does not fit the base model or this server's limits."""


class BadSource(AdapterError):
    """A source that this server does not load from, or that is not written as one."""

    whose = "caller"


class NoAdapter(AdapterError):
    """No adapter of this name (or of this version) is known."""

    whose = "caller"


class Conflict(AdapterError):
    """The name is taken by other content, or the adapter's state does not allow the change."""

    whose = "caller"


class SourceAway(AdapterError):
    """The source did not answer, broke off or was too slow."""

    whose = "source"


class ServerFault(AdapterError):
    """The server failed for a reason of its own; it says nothing of the artefact."""

    whose = "server"


class FilesLost(ServerFault):
    """Files in the store were changed or are gone, and could not be fetched again."""


class StoreFull(ServerFault):
    """The store's disk is full; it holds what it held before."""


class NoRoom(ServerFault):
    """The engine holds as many adapters as it may, has no memory for one more, or one is larger
    than all of its room.
    """


class RankFault(ServerFault):
    """A rank of the engine gave up because another one failed, which says why."""


class EngineAway(ServerFault):
    """The engine did not answer in time, or has ended."""


class RegistryAway(ServerFault):
    """Redis does not answer, or its registry has another schema version."""


def passing(error: BaseException) -> bool:
    """Whether trying again may help, because neither the artefact nor the request is at fault."""
    return isinstance(error, AdapterError) and error.whose in ("source", "server")


# Between two processes: an error's class by its name, and what it says.

_BY_NAME: dict[str, type[AdapterError]] = {
    kind.__name__: kind
    for kind in (
        AdapterError, BadAdapter, TooLarge, DoesNotFit, BadSource, NoAdapter, Conflict,
        SourceAway, ServerFault, FilesLost, StoreFull, NoRoom, RankFault, EngineAway,
        RegistryAway,
    )
}  # fmt: skip


def kind_of(name: str) -> type[AdapterError]:
    """The class of this name; `AdapterError` for a name that this version does not know."""
    return _BY_NAME.get(name, AdapterError)


def to_wire(error: AdapterError) -> dict[str, str]:
    """An error as plain data."""
    return {"kind": type(error).__name__, "text": str(error)}


def from_wire(raw: dict[str, str]) -> AdapterError:
    """The error that `to_wire` was given; its field and value are part of its message."""
    return kind_of(raw["kind"])(raw["text"])
