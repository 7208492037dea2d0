"""Stores of the registry's records: `RedisStore` for replicas, `SqliteStore` for one server.

Every write has a token, 24 random letters, which no other write of any store ever has. A record
carries the token of the write that made it, and a change names the token of the record that it
changes. A reader remembers the token of the last write that it has seen: a store in whose log that
write stands has everything before it too, and tells what came after. A store that does not know
the write (a Redis that was restored, or that lost writes when it failed over) is read as a whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from adapters.registry.record import Record

TOKEN = 24
"""Letters of a token."""

LOG = 4096
"""Writes that a store's log remembers; who is further behind reads everything."""


def new_token() -> str:
    """A token that no other write has."""
    return secrets.token_hex(TOKEN // 2)


class Position(NamedTuple):
    """How far a reader is.

    Args:
        registry: id of the registry, made with it.
        writes: how many came before; says where in the log to look, and nothing else: a registry
            that was restored counts them again.
        token: of the last write.
    """

    registry: str = ""
    writes: int = 0
    token: str = ""


NOWHERE = Position()
"""The position of a reader that has seen nothing."""


@dataclass(frozen=True)
class Changes:
    """The changes since the last look.

    Args:
        position: how far the reader is now.
        records: by name; None: it is gone.
        whole: these are all records; else those that changed.
        more: there are more changes, to be had with the next look.
        total: records in the store; counts for nothing while there is `more`.
        alive: replicas whose lease has not run out.
    """

    position: Position
    records: Mapping[str, Record | None] = field(default_factory=dict)
    whole: bool = False
    more: bool = False
    total: int = 0
    alive: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Swapped:
    """The result of a swap.

    Args:
        outcome: `done`; `other`: another change came first; `pins`: too many are pinned.
        pins: how many are pinned, where that is too many.
    """

    outcome: Literal["done", "other", "pins"]
    pins: int = 0


Wait = Callable[[float], Awaitable[None]]
"""Returns after a change, or so many seconds."""


class Store(Protocol):
    """Reads and swaps records. Lives on one event loop.

    All raise RegistryAway: the store does not answer (a change may or may not have been made), or
    the registry has another schema.
    """

    registry: str
    """Id of the registry that changes and reads are meant for; empty: whichever there is. Where
    there is another one they raise RegistryAway: the caller who noticed the loss repairs it."""

    async def look(self, since: Position, *, replica: str = "", alive_ms: int = 0) -> Changes:
        """Returns the changes, and renews the replica's lease.

        Args:
            since: how far the reader is.
            replica: whose lease.
            alive_ms: for how long, in milliseconds; 0: no lease is written.
        """
        ...

    async def read(self, name: str) -> Record | None:
        """One record."""
        ...

    async def swap(
        self, name: str, old: str, new: Record | None, token: str, *,
        most_pins: int | None = None, into: str | None = None,
    ) -> Swapped:  # fmt: skip
        """Replaces a record if it is still the one that the caller saw.

        Args:
            name: whose.
            old: token of what the caller saw; empty: no record.
            new: what it becomes; None: it is deleted.
            token: a new one.
            most_pins: how many records may be pinned if this becomes one more; None: any number.
            into: id of the registry; None: `registry`.
        """
        ...

    async def tell_progress(self, name: str, job: str, done_bytes: int) -> None:
        """Records the progress of a download, which is no change: nobody is notified."""
        ...

    async def progress(self, jobs: Mapping[str, str]) -> dict[str, int]:
        """How much is fetched, by name; those of which nothing is known are absent.

        Args:
            jobs: by name.
        """
        ...

    def hints(self) -> AbstractAsyncContextManager[Wait]:
        """To wait for changes. A hint may be lost: who misses one finds the change anyway."""
        ...

    async def leave(self, replica: str) -> None:
        """Ends a replica's lease, so that others need not wait for it to run out."""
        ...
