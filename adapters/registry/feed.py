"""Keeps a replica's view of the registry fresh, and its lease alive, while Redis comes and goes.

A hint wakes it at once; without one it looks every `every_s`, so a lost message, a broken
connection or a restarted Redis delays convergence by that much and no more.

A registry that is gone (`FLUSHALL`, an empty Redis in the place of the old one) is not followed:
nobody has unloaded anything. What this replica knew is put back where its name is free, and said.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from redis.exceptions import RedisError

from adapters.errors import RegistryAway
from adapters.registry.record import Record
from adapters.registry.store import LOG, NOWHERE, Changes, Store, new_token

logger = logging.getLogger("coxswain")

_AT_ONCE = 64
"""Records that are put back at the same time."""


class Feed:
    """One task. Owned by the manager; `run` ends only when it is cancelled.

    Args:
        store: what is looked at.
        replica: whose lease is renewed.
        tell: called with the names of records that changed, on the event loop; must not block.
        every_s: longest time between two looks, seconds.
        alive_s: how long the lease holds without renewal, seconds; more than twice `every_s`.
    """

    def __init__(
        self,
        store: Store,
        replica: str,
        tell: Callable[[list[str]], None],
        *,
        every_s: float = 3.0,
        alive_s: float = 10.0,
    ) -> None:
        assert alive_s > 2 * every_s
        self._store, self._replica, self._tell = store, replica, tell
        self._every_s, self._alive_s = every_s, alive_s
        self._records: dict[str, Record] = {}
        self.records: Mapping[str, Record] = MappingProxyType(self._records)
        """The registry as this replica saw it last."""
        self.pinned: set[str] = set()
        """Names of the records that are pinned."""
        self.alive: frozenset[str] = frozenset()
        """Replicas whose lease has not run out."""
        self.losses = 0
        """How often the registry was gone, or older than this replica's view of it."""
        self.away: str | None = "not connected yet"
        """Why the registry cannot be reached; None while it can."""
        self._position = NOWHERE
        self._turn = asyncio.Lock()
        self._back_since_s: float | None = None
        self._looked_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last look that succeeded."""
        return time.monotonic() - self._looked_s

    @property
    def trusts_leases(self) -> bool:
        """Whether a missing lease means a dead replica.

        Not right after Redis was away, or has lost writes: the others' leases ran out or went in
        that time as well, and they get as long as a lease lasts to renew them.
        """
        back = self._back_since_s
        return self.away is None and (back is None or time.monotonic() - back > self._alive_s)

    async def run(self) -> None:
        """Looks, for ever."""
        pause_s = 0.05
        while True:
            try:
                async with self._store.hints() as wait:
                    while True:
                        await self.look()
                        pause_s = 0.05
                        await wait(self._every_s)
            except (RegistryAway, RedisError, OSError) as error:
                self._lost_sight(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._every_s)

    async def look(self) -> None:
        """One look, now, at all that has changed; also renews the lease.

        Raises:
            RegistryAway: the store does not answer.
        """
        async with self._turn:  # an answer must not arrive behind a newer one
            before = self._store.registry
            while not await self._catch_up():
                pass
        if self.away is not None:
            if before:
                logger.warning("the registry answers again")
                self._back_since_s = time.monotonic()
            self.away = None
        self._looked_s = time.monotonic()

    async def _catch_up(self) -> bool:
        """One piece of what has changed; whether it was the last."""
        since, alive_ms = self._position, int(self._alive_s * 1000)
        changes = await self._store.look(since, replica=self._replica, alive_ms=alive_ms)
        if self._store.registry not in ("", changes.position.registry):
            await self._put_back(changes)
            self._store.registry, self._position = changes.position.registry, NOWHERE
            return False
        if since.token and changes.whole and changes.position.writes - since.writes < LOG:
            self._forgot()
            logger.error("Redis has lost the registry's last writes (it was restored, or failed "
                         "over); this replica follows what is left")  # fmt: skip
        self._take(changes)
        if changes.more:
            return False
        if changes.total != len(self._records):
            self._position = NOWHERE
            return False
        return True

    def _take(self, changes: Changes) -> None:
        """Makes the view what a look has brought, and tells what changed in it."""
        changed = [n for n, record in changes.records.items() if record != self._records.get(n)]
        if changes.whole:
            changed += self._records.keys() - changes.records.keys()
        for name in changed:
            record = changes.records.get(name)
            if record is None:
                self._records.pop(name, None)
            else:
                self._records[name] = record
            (self.pinned.add if record and record.pinned else self.pinned.discard)(name)
        self._position, self.alive = changes.position, changes.alive
        self._store.registry = changes.position.registry
        self._tell(changed)

    async def _put_back(self, changes: Changes) -> None:
        """Writes what this replica knew into a registry that does not; others do the same."""
        self._forgot()
        into = changes.position.registry
        missing = [record for name, record in self._records.items() if name not in changes.records]
        logger.error("Redis has lost the registry (FLUSHALL, or another Redis in its place); this "
                     "replica puts %d records back", len(missing))  # fmt: skip
        left = iter(missing)
        while some := list(itertools.islice(left, _AT_ONCE)):
            await asyncio.gather(
                *(self._store.swap(r.name, "", r, new_token(), into=into) for r in some)
            )

    def _forgot(self) -> None:
        """Redis has lost writes, and with them, it may be, leases of replicas that live."""
        self.losses += 1
        self._back_since_s = time.monotonic()

    def _lost_sight(self, error: Exception) -> None:
        if self.away is None:
            logger.warning("the registry is away (%s); what is loaded goes on serving", error)
        self.away = str(error)

    async def leave(self) -> None:
        """Gives the lease back, if the store answers."""
        with contextlib.suppress(RegistryAway):
            await self._store.leave(self._replica)
