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
    """The part of the engine that is used here."""

    async def load_set(self, adapter_set: AdapterSet) -> None:
        """Loads a set into a slot.

        Raises:
            AdapterError: that cannot be done; nothing of it is left.
        """
        ...

    async def unload_set(self, adapter_set: AdapterSet) -> None:
        """Empties its slot."""
        ...


@dataclass(eq=False)
class _Slot:
    """A set in the engine.

    Args:
        found: the set.
        size: its bytes.
        users: requests that run on it.
        leaving: it goes when its last user is done; new users line up for another slot.
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
        self._taken: OrderedDict[str, _Slot] = OrderedDict()  # least recently used first
        self._making_room = asyncio.Lock()
        self._idle = asyncio.Event()
        self._evictions: set[asyncio.Task[None]] = set()
        self.loads = self.evictions = 0

    @property
    def held(self) -> list[AdapterSet]:
        """The sets in the engine, least recently used first."""
        return [slot.found for slot in self._taken.values()]

    @property
    def alone(self) -> set[tuple[str | None, str | None]]:
        """(owner, digest) of the adapters that are sets of their own in the engine."""
        by_slot = [slot.found.members for slot in self._taken.values()]
        return {(members[0].owner, members[0].digest) for members in by_slot if len(members) == 1}

    @property
    def bytes(self) -> int:
        """Their size together, in bytes."""
        return sum(slot.size for slot in self._taken.values())

    def check(self, size: int, field: str) -> None:
        """Whether something of this size can ever be held.

        Raises:
            DoesNotFit: it is larger than the whole budget.
        """
        if size > self.max_bytes:
            raise DoesNotFit("more bytes than adapters.max_loaded_bytes", field=field, value=size,
                             allowed=f"≤ {self.max_bytes}")  # fmt: skip

    def check_room(self, adapter_set: AdapterSet) -> None:
        """Whether a set can be held as long as the pins are as they are; asked before a response
        begins, whose status could not tell afterwards.

        Raises:
            NoRoom: what is pinned leaves too little.
            DoesNotFit: it is larger than all of the room.
        """
        if adapter_set.name in self._taken:
            return
        size = self._bytes_of(adapter_set)
        self.check(size, "adapters")
        pinned = [slot for slot in self._taken.values() if self._pinned(slot.found)]
        if any(slot.found.set_id == adapter_set.set_id for slot in pinned):
            raise NoRoom(_SAME_ID, field="adapters")
        if len(pinned) >= self.slots or sum(s.size for s in pinned) + size > self.max_bytes:
            raise NoRoom(_PINNED, field="adapters")

    def spare(self, adapter_set: AdapterSet) -> bool:
        """Whether a set can be brought in without another leaving; nobody is kept waiting."""
        size = self._bytes_of(adapter_set)
        return not self._making_room.locked() and not self._in_the_way(adapter_set, size)

    @asynccontextmanager
    async def holding(self, adapter_set: AdapterSet) -> AsyncIterator[None]:
        """Keeps a set in the engine; waits for room first, in the order of arrival.

        Raises:
            NoRoom: everything that is held is pinned.
            DoesNotFit: it is larger than all of the room.
            AdapterError: the engine could not load it.
        """
        slot = await self._take(adapter_set)
        try:
            await asyncio.shield(slot.loading)
            yield
        finally:
            slot.users -= 1
            if not slot.users:
                self._idle.set()

    async def admit(self, adapter_set: AdapterSet) -> None:
        """Loads a set into the engine before a request needs it."""
        async with self.holding(adapter_set):
            pass

    async def remove(self, digest: str) -> None:
        """Takes every set out that has some content, once its users are done."""
        while slots := [
            slot
            for slot in self._taken.values()
            if any(member.digest == digest for member in slot.found.members)
        ]:
            self.drop(digest)
            if any(slot.users for slot in slots):
                await self._becomes_idle()
        await asyncio.gather(*self._evictions)

    def drop(self, digest: str) -> None:
        """Evicts every set that has some content and no user, also one that is still loading."""
        for slot in list(self._taken.values()):
            if not slot.users and any(member.digest == digest for member in slot.found.members):
                self._evict(slot)

    async def _take(self, adapter_set: AdapterSet) -> _Slot:
        """The set's slot with this user counted; it may still be loading."""
        slot = self._taken.get(adapter_set.name)
        if slot is None or slot.leaving:
            async with self._making_room:
                slot = self._taken.get(adapter_set.name)
                if slot is None:
                    size = self._bytes_of(adapter_set)
                    await self._make_room(adapter_set, size)
                    slot = self._open(adapter_set, size)
        slot.users += 1
        self._taken.move_to_end(adapter_set.name)
        return slot

    async def _make_room(self, adapter_set: AdapterSet, size: int) -> None:
        """Evicts the least recently used until there is room; one caller at a time, in order.

        If all are in use, the oldest takes no new users: constant traffic on those that are held
        must not keep others out for ever.
        """
        self.check(size, "adapters")
        while in_the_way := self._in_the_way(adapter_set, size):
            unpinned = [slot for slot in in_the_way if not self._pinned(slot.found)]
            if not unpinned:
                same_id = in_the_way[0].found.set_id == adapter_set.set_id
                raise NoRoom(_SAME_ID if same_id else _PINNED, field="adapters")
            idle = next((slot for slot in unpinned if not slot.users), None)
            if idle is not None:
                self._evict(idle)
                continue
            unpinned[0].leaving = True
            try:
                await self._becomes_idle()
            finally:
                unpinned[0].leaving = False

    def _in_the_way(self, adapter_set: AdapterSet, size: int) -> list[_Slot]:
        """Slots of which one must go first, the least recently used before the others.

        The engine knows sets by their ids, so the one that has this set's id must go. Else all
        are in the way if the engine is full, and none if not.
        """
        slots = list(self._taken.values())
        if same_id := [slot for slot in slots if slot.found.set_id == adapter_set.set_id]:
            return same_id
        full = len(slots) >= self.slots or self.bytes + size > self.max_bytes
        return slots if full else []

    async def _becomes_idle(self) -> None:
        self._idle.clear()
        await self._idle.wait()

    def _open(self, adapter_set: AdapterSet, size: int) -> _Slot:
        slot = _Slot(adapter_set, size)
        self._taken[adapter_set.name] = slot
        slot.loading = asyncio.create_task(self._load(slot))
        # Whoever asked may be gone when it fails.
        slot.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return slot

    async def _load(self, slot: _Slot) -> None:
        await asyncio.gather(*self._evictions)  # their slots must be free
        try:
            with LOAD_SECONDS.time():
                await self._engine.load_set(slot.found)
            self.loads += 1
        except BaseException:
            if self._taken.get(slot.found.name) is slot:
                del self._taken[slot.found.name]
            raise

    def _evict(self, slot: _Slot) -> None:
        del self._taken[slot.found.name]
        self.evictions += 1
        task = asyncio.create_task(self._unload(slot))
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)

    async def _unload(self, slot: _Slot) -> None:
        try:
            await asyncio.wait([slot.loading])
            with EVICT_SECONDS.time():
                await self._engine.unload_set(slot.found)
        except Exception as error:  # a dead engine is noticed elsewhere
            logger.debug("a set could not be unloaded", exc_info=error)
