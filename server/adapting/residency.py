"""Which sets of adapters the engine holds: at most so many, and so many bytes; the rest waits.

A request enters the engine only while its set is held, so the engine never loads or evicts by
itself: not inside a step, and never one that a running request needs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from adapters.errors import DoesNotFit, NoRoom
from adapters.sets import AdapterSet
from server.operation.metrics import EVICT_SECONDS, LOAD_SECONDS

logger = logging.getLogger("coxswain")

_PINNED = "the adapters that are pinned leave no room"
_SAME_ID = "the engine gives these adapters the id of others that are pinned; unpin those"


class Slots(Protocol):
    """What of the engine is needed here."""

    async def load_set(self, found: AdapterSet) -> None:
        """Loads a set into a slot.

        Raises:
            AdapterError: that cannot be done; nothing of it is left.
        """
        ...

    async def unload_set(self, found: AdapterSet) -> None:
        """Empties its slot."""
        ...


@dataclass(eq=False)
class _Seat:
    """A set in the engine.

    Args:
        found: the set.
        size: its bytes.
        users: requests that run on it.
        leaving: it goes when its last user is done; new users line up for another seat.
        loading: done when it can be used.
    """

    found: AdapterSet
    size: int
    users: int = 0
    leaving: bool = False
    loading: asyncio.Task[None] = field(init=False)


class Residency:
    """One per engine, on its event loop.

    Args:
        engine: with `slots` LoRA slots.
        slots: sets that it holds at most.
        max_bytes: and how many bytes they may have together.
        bytes_of: the size of a set.
        pinned: whether a set is never evicted.
    """

    def __init__(
        self,
        engine: Slots,
        *,
        slots: int,
        max_bytes: int,
        bytes_of: Callable[[AdapterSet], int],
        pinned: Callable[[AdapterSet], bool],
    ) -> None:
        self._engine, self._bytes_of, self._pinned = engine, bytes_of, pinned
        self.slots, self.max_bytes = slots, max_bytes
        self._seats: OrderedDict[str, _Seat] = OrderedDict()  # least recently used first
        self._door = asyncio.Lock()
        self._idle = asyncio.Event()
        self._evictions: set[asyncio.Task[None]] = set()
        self.loads = self.evictions = 0

    @property
    def held(self) -> list[AdapterSet]:
        """The sets in the engine, least recently used first."""
        return [seat.found for seat in self._seats.values()]

    @property
    def alone(self) -> set[tuple[str | None, str | None]]:
        """(owner, digest) of the adapters that are sets of their own in the engine."""
        members = [seat.found.members for seat in self._seats.values()]
        return {(one[0].owner, one[0].digest) for one in members if len(one) == 1}

    @property
    def bytes(self) -> int:
        """What they take together."""
        return sum(seat.size for seat in self._seats.values())

    def check(self, size: int, field: str) -> None:
        """Whether something of this size can ever be held.

        Raises:
            DoesNotFit: it is larger than the whole budget.
        """
        if size > self.max_bytes:
            raise DoesNotFit("more bytes than adapters.max_loaded_bytes", field=field, value=size,
                             allowed=f"≤ {self.max_bytes}")  # fmt: skip

    def check_room(self, found: AdapterSet) -> None:
        """Whether a set can be held as long as the pins are as they are; asked before a response
        begins, whose status could not tell afterwards.

        Raises:
            NoRoom: what is pinned leaves too little.
            DoesNotFit: it is larger than all of the room.
        """
        if found.name in self._seats:
            return
        size = self._bytes_of(found)
        self.check(size, "adapters")
        pinned = [seat for seat in self._seats.values() if self._pinned(seat.found)]
        if any(seat.found.set_id == found.set_id for seat in pinned):
            raise NoRoom(_SAME_ID, field="adapters")
        if len(pinned) >= self.slots or sum(s.size for s in pinned) + size > self.max_bytes:
            raise NoRoom(_PINNED, field="adapters")

    def spare(self, found: AdapterSet) -> bool:
        """Whether a set can be brought in without another leaving; nobody is kept waiting."""
        size = self._bytes_of(found)
        return not self._door.locked() and not self._in_the_way(found, size)

    @asynccontextmanager
    async def holding(self, found: AdapterSet) -> AsyncIterator[None]:
        """Keeps a set in the engine; waits for room first, in the order of arrival.

        Raises:
            NoRoom: everything that is held is pinned.
            DoesNotFit: it is larger than all of the room.
            AdapterError: the engine could not load it.
        """
        seat = await self._take(found)
        try:
            await asyncio.shield(seat.loading)
            yield
        finally:
            seat.users -= 1
            if not seat.users:
                self._idle.set()

    async def admit(self, found: AdapterSet) -> None:
        """Brings a set into the engine before somebody asks for it."""
        async with self.holding(found):
            pass

    async def remove(self, digest: str) -> None:
        """Takes every set out that has some content, once its users are done."""
        while seats := [
            seat
            for seat in self._seats.values()
            if any(member.digest == digest for member in seat.found.members)
        ]:
            self.drop(digest)
            if any(seat.users for seat in seats):
                await self._becomes_idle()
        await asyncio.gather(*self._evictions)

    def drop(self, digest: str) -> None:
        """Evicts every set that has some content and no user, also one that is still loading."""
        for seat in list(self._seats.values()):
            if not seat.users and any(member.digest == digest for member in seat.found.members):
                self._evict(seat)

    async def _take(self, found: AdapterSet) -> _Seat:
        """The set's seat with this user counted; it may still be loading."""
        seat = self._seats.get(found.name)
        if seat is None or seat.leaving:
            async with self._door:
                seat = self._seats.get(found.name)
                if seat is None:
                    size = self._bytes_of(found)
                    await self._make_room(found, size)
                    seat = self._open(found, size)
        seat.users += 1
        self._seats.move_to_end(found.name)
        return seat

    async def _make_room(self, found: AdapterSet, size: int) -> None:
        """Evicts the least recently used until there is room; behind the door.

        If all are in use, the oldest takes no new users: constant traffic on those that are held
        must not keep others out for ever.
        """
        self.check(size, "adapters")
        while in_the_way := self._in_the_way(found, size):
            unpinned = [seat for seat in in_the_way if not self._pinned(seat.found)]
            if not unpinned:
                same_id = in_the_way[0].found.set_id == found.set_id
                raise NoRoom(_SAME_ID if same_id else _PINNED, field="adapters")
            idle = next((seat for seat in unpinned if not seat.users), None)
            if idle is not None:
                self._evict(idle)
                continue
            unpinned[0].leaving = True
            try:
                await self._becomes_idle()
            finally:
                unpinned[0].leaving = False

    def _in_the_way(self, found: AdapterSet, size: int) -> list[_Seat]:
        """Seats of which one must go first, the least recently used before the others.

        The engine knows sets by their ids, so the one that has this set's id must go. Else all
        are in the way if the engine is full, and none if not.
        """
        seats = list(self._seats.values())
        if same_id := [seat for seat in seats if seat.found.set_id == found.set_id]:
            return same_id
        full = len(seats) >= self.slots or self.bytes + size > self.max_bytes
        return seats if full else []

    async def _becomes_idle(self) -> None:
        self._idle.clear()
        await self._idle.wait()

    def _open(self, found: AdapterSet, size: int) -> _Seat:
        seat = _Seat(found, size)
        self._seats[found.name] = seat
        seat.loading = asyncio.create_task(self._load(seat))
        # Whoever asked may be gone when it fails.
        seat.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return seat

    async def _load(self, seat: _Seat) -> None:
        await asyncio.gather(*self._evictions)  # their slots must be free
        try:
            with LOAD_SECONDS.time():
                await self._engine.load_set(seat.found)
            self.loads += 1
        except BaseException:
            if self._seats.get(seat.found.name) is seat:
                del self._seats[seat.found.name]
            raise

    def _evict(self, seat: _Seat) -> None:
        del self._seats[seat.found.name]
        self.evictions += 1
        task = asyncio.create_task(self._unload(seat))
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)

    async def _unload(self, seat: _Seat) -> None:
        try:
            await asyncio.wait([seat.loading])
            with EVICT_SECONDS.time():
                await self._engine.unload_set(seat.found)
        except Exception as error:  # a dead engine is noticed elsewhere
            logger.debug("a set could not be unloaded", exc_info=error)
