"""Keeps a replica's view of the registry fresh, and its lease alive, while Redis comes and goes.

Pub/sub wakes it at once; without a hint it looks every `every_s`, so a lost message, a broken
connection or a restarted Redis delays convergence by that much and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from adapters.errors import RegistryAway
from adapters.registry.store import NOTHING, Snapshot, Store, heeding

logger = logging.getLogger("coxswain")


class Feed:
    """One task. Owned by the manager; `run` ends only when it is cancelled.

    Args:
        client: for the subscription.
        store: for the looks.
        replica: whose lease is renewed.
        every_s: longest time between two looks, seconds.
        alive_s: how long the lease holds without renewal, seconds; more than twice `every_s`.
        tell: called with every look's snapshot, on the event loop; must not block.
    """

    def __init__(
        self,
        client: Redis,
        store: Store,
        replica: str,
        tell: Callable[[Snapshot], None],
        *,
        every_s: float = 3.0,
        alive_s: float = 10.0,
    ) -> None:
        assert alive_s > 2 * every_s
        self._client, self._store, self._replica, self._tell = client, store, replica, tell
        self._every_s, self._alive_s = every_s, alive_s
        self.latest = NOTHING
        self.away: str | None = "not connected yet"
        """Why the registry cannot be reached; None while it can."""
        self._back_since_s: float | None = None
        self._looked_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last look that succeeded."""
        return time.monotonic() - self._looked_s

    @property
    def trusts_leases(self) -> bool:
        """Whether a missing lease means a dead replica.

        Not right after Redis was away: the others' leases ran out in that time as well, and
        they get as long as a lease lasts to renew them.
        """
        back = self._back_since_s
        return self.away is None and (back is None or time.monotonic() - back > self._alive_s)

    async def run(self) -> None:
        """Looks, for ever."""
        pause_s = 0.05
        while True:
            try:
                async with self._client.pubsub() as subscription:
                    await heeding(subscription.subscribe(self._store.channel))
                    while True:
                        await self.look()
                        pause_s = 0.05
                        await self._hint(subscription)
            except (RegistryAway, RedisError, OSError) as error:
                self._lost(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._every_s)

    async def look(self) -> Snapshot:
        """One look, now; also renews the lease.

        Raises:
            RegistryAway: Redis does not answer.
        """
        alive_ms, known = int(self._alive_s * 1000), self.latest
        snapshot = await self._store.look(known, replica=self._replica, alive_ms=alive_ms)
        if self.away is not None:
            if self.latest is not NOTHING:
                logger.warning("the registry answers again")
                self._back_since_s = time.monotonic()
            self.away = None
        # Looks overlap, and an answer may arrive behind a newer one. Where none did, an older one
        # is the truth: Redis has lost writes.
        if self.latest is not known and snapshot.before(self.latest):
            return self.latest
        self.latest = snapshot
        self._looked_s = time.monotonic()
        self._tell(snapshot)
        return snapshot

    async def _hint(self, subscription: PubSub) -> None:
        """Waits for a message, at most `every_s`; takes all that are there."""
        wait_s = self._every_s
        while await heeding(subscription.get_message(timeout=wait_s)) is not None:
            wait_s = 0.0

    def _lost(self, error: Exception) -> None:
        if self.away is None:
            logger.warning("the registry is away (%s); what is loaded goes on serving", error)
        self.away = str(error)

    async def leave(self) -> None:
        """Gives the lease back, if Redis answers."""
        with contextlib.suppress(RegistryAway):
            await self._store.leave(self._replica)
