"""The operations on the registry: each is one compare-and-set on one record.

Lives on one event loop of one replica; any number of replicas may do the same at the same time.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from adapters.errors import Conflict, NoAdapter, RegistryAway
from adapters.registry.record import WORKING, Content, Facts, Record, State
from adapters.registry.store import Store, new_token

MOST_ATTEMPTS = 3
"""An adapter whose loading was cut off this often is given up: it may be what kills the server."""

_MOST_RETRIES = 500
_PAUSE_S = 0.002

Edit = Callable[[Record | None], Record | None]


class Registry:
    """The verbs. Every one raises `RegistryAway` while the store does not answer.

    Args:
        store: the bytes.
        replica: this replica's name, unique among all that share the registry.
    """

    def __init__(self, store: Store, replica: str) -> None:
        self._store = store
        self.replica = replica

    async def get(self, name: str) -> Record:
        """One record.

        Raises:
            NoAdapter: there is none.
        """
        return _there(await self._store.read(name), name)

    async def submit(
        self,
        want: Content,
        *,
        replace: bool = False,
        pin: bool = False,
        by: str = "",
        most_pins: int | None = None,
    ) -> Record:
        """Asks for an adapter; this replica becomes the owner of the work.

        The same request again changes nothing, unless it failed or `replace` asks for a new
        fetch. Where `want` has a digest it decides: the same content from elsewhere is the same,
        and other content from the same source is not.

        Raises:
            Conflict: the name is taken by other content and `replace` is false, or is unloading;
                or `most_pins` are pinned already.
        """

        def edit(record: Record | None) -> Record:
            now = time.time()
            if record is None:
                return self._begun(Record(want, "pending", now, now, pinned=pin, loaded_by=by))
            if record.state == "unloading":
                raise Conflict("the adapter is being unloaded; try again", field="name",
                               value=want.name)  # fmt: skip
            taken = record.state != "failed" or record.serving is not None
            same = _same(record.want, want)
            if taken and not replace and not same:
                raise Conflict(_taken(record), field="name", value=want.name)
            if record.state != "failed" and same and not replace:
                return record
            pending = record.to("pending", now_s=now, want=want, attempts=0,
                                pinned=record.pinned or pin, loaded_by=by)  # fmt: skip
            return self._begun(pending)

        changed = await self._change(want.name, edit, most_pins=most_pins)
        assert changed is not None
        return changed

    async def take(self, seen: Record) -> Record | None:
        """Takes over work whose owner is gone; gives it up after `MOST_ATTEMPTS`.

        Returns:
            The record with this replica as owner, or failed; None: another was faster.
        """
        now = time.time()
        if seen.state == "unloading":
            mine = msgspec.structs.replace(seen, owner=self.replica, changed_s=now)
        elif seen.attempts >= MOST_ATTEMPTS:
            reason = f"interrupted {seen.attempts} times while {seen.state}: the process ended"
            mine = seen.to("failed", now_s=now, reason=reason)
        else:
            mine = self._begun(seen.to("pending", now_s=now))
        token = new_token()
        swapped = await self._store.swap(seen.name, seen.token, mine, token)
        return msgspec.structs.replace(mine, token=token) if swapped.outcome == "done" else None

    async def advance(self, job: Record, state: State, **changes: Any) -> Record | None:
        """The owner's next state: downloading, loading, failed.

        Returns:
            The new record; None: the work was superseded (replaced, unloaded or taken over).
        """
        return await self._mine(job, lambda r: r.to(state, now_s=time.time(), **changes))

    async def release(self, job: Record) -> Record | None:
        """Gives work back that an orderly end has cut off: that is no failed attempt."""

        def edit(record: Record) -> Record:
            return record.to("pending", now_s=time.time(), attempts=record.attempts - 1,
                             owner=None, job="")  # fmt: skip

        return await self._mine(job, edit)

    async def ready(self, job: Record, facts: Facts) -> Record | None:
        """The owner has loaded it: from here on it serves, everywhere. None: superseded."""

        def edit(record: Record) -> Record:
            want = msgspec.structs.replace(record.want, facts=facts)
            return record.to("ready", now_s=time.time(), want=want, serving=want, attempts=0)

        return await self._mine(job, edit)

    async def remove(self, name: str) -> Record:
        """Begins to unload; requests no longer find the adapter from here on.

        Raises:
            NoAdapter: there is none.
        """

        def edit(record: Record | None) -> Record:
            current = _there(record, name)
            if current.state == "unloading":
                return current
            return current.to("unloading", now_s=time.time(), owner=self.replica,
                              job=secrets.token_hex(8))  # fmt: skip

        changed = await self._change(name, edit)
        assert changed is not None
        return changed

    async def forget(self, seen: Record) -> bool:
        """Deletes a record that is unloading; false: it is gone or another one by now."""
        assert seen.state == "unloading"
        swapped = await self._store.swap(seen.name, seen.token, None, new_token())
        return swapped.outcome == "done"

    async def pin(self, name: str, pinned: bool, *, most: int | None = None) -> Record:
        """Pins or unpins.

        Args:
            name: which.
            pinned: what it becomes.
            most: how many may be pinned in all; None: any number.

        Raises:
            NoAdapter: there is none.
            Conflict: `most` are pinned already, or it is unloading.
        """

        def edit(record: Record | None) -> Record:
            current = _there(record, name)
            if current.state == "unloading":
                raise Conflict("the adapter is being unloaded", field="name", value=name)
            if current.pinned == pinned:
                return current
            return msgspec.structs.replace(current, pinned=pinned, changed_s=time.time())

        changed = await self._change(name, edit, most_pins=most)
        assert changed is not None
        return changed

    def _begun(self, record: Record) -> Record:
        return msgspec.structs.replace(
            record, owner=self.replica, job=secrets.token_hex(8), attempts=record.attempts + 1
        )

    async def _mine(self, job: Record, edit: Callable[[Record], Record]) -> Record | None:
        def guarded(record: Record | None) -> Record | None:
            if record is None or record.job != job.job or record.state not in WORKING:
                raise _SupersededError
            return edit(record)

        try:
            return await self._change(job.name, guarded)
        except _SupersededError:
            return None

    async def _change(
        self, name: str, edit: Edit, *, most_pins: int | None = None
    ) -> Record | None:
        """Reads, edits and swaps until no other change came between."""
        for _ in range(_MOST_RETRIES):
            record = await self._store.read(name)
            new = edit(record)
            if new is record:
                return record
            token, old = new_token(), record.token if record else ""
            swapped = await self._store.swap(name, old, new, token, most_pins=most_pins)
            if swapped.outcome == "done":
                return msgspec.structs.replace(new, token=token) if new else None
            if swapped.outcome == "pins":
                raise Conflict(f"{swapped.pins} adapters are pinned, which is the most; unpin one "
                               "first", field="pin")  # fmt: skip
            await asyncio.sleep(random.uniform(0, _PAUSE_S))
        raise _busy(name)


class _SupersededError(Exception):
    """Control flow inside `_mine`."""


def _same(current: Content, want: Content) -> bool:
    if want.digest is not None and current.digest is not None:
        return want.key == current.key and want.visible_to == current.visible_to
    return current.same_request(want)


def _there(record: Record | None, name: str) -> Record:
    if record is None:
        raise NoAdapter("no such adapter", field="name", value=name)
    return record


def _taken(record: Record) -> str:
    held = record.serving or record.want
    digest = f", digest {held.digest[:12]}…" if held.digest else ""
    return (f"the name is taken by version {held.version!r} from {held.source}{digest}; give "
            "`replace: true` to replace it")  # fmt: skip


def _busy(name: str) -> RegistryAway:
    return RegistryAway(f"{name!r} is being changed by too many at once; try again")
