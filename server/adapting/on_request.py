"""Loads adapters that requests name and nobody has registered (`adapters.load_on_request`)."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

from adapters.errors import AdapterError, BadSource, NoAdapter, NoRoom, SourceAway, kind_of
from adapters.registry.manager import Manager
from adapters.registry.record import NAME, WORKING
from adapters.sources.source import parse_source
from adapters.thread import in_thread
from server.settings.config import AdaptersConfig

BY = "a request"
"""Whom the records of such adapters name as their cause."""

MOST = 1000
"""Adapters that requests may have registered, and names that are remembered as found nowhere."""

LOOKS = 4
"""Names that are looked for at the same time."""

AGAIN_S = 30.0
"""After how long a name is looked for again that was found nowhere, or whose load has failed."""

_LOOK_S = 0.05


class LoadOnRequest:
    """One per server, on its event loop.

    Args:
        manager: the registry.
        section: `adapters` of the configuration.
    """

    def __init__(self, manager: Manager, section: AdaptersConfig) -> None:
        self._manager = manager
        self._sources = section.request_sources or (*section.roots, *section.remotes)
        self._wait_s = section.request_wait_s
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._looks = asyncio.Semaphore(LOOKS)
        self._nowhere: OrderedDict[str, float] = OrderedDict()

    async def load(self, name: str, field: str) -> None:
        """Loads an adapter that does not answer here, and waits until it does. Of several requests
        that name it, all wait for one load. Nothing happens where no source has it.

        Args:
            name: of the adapter.
            field: where the request names it.

        Raises:
            AdapterError: it cannot be served, or not in time; or a source did not answer.
        """
        task = self._loads.get(name)
        if task is None:
            task = asyncio.create_task(self._load(name))
            self._loads[name] = task
            task.add_done_callback(lambda done: self._over(name, done))
        try:
            async with asyncio.timeout(self._wait_s):
                await asyncio.shield(task)
        except TimeoutError:
            raise SourceAway("the adapter is being loaded; not ready within "
                             f"adapters.request_wait_s ({self._wait_s:g} s)", field=field,
                             value=name) from None  # fmt: skip
        except AdapterError as error:
            raise type(error)(error.message, field=field, value=name) from error

    def _over(self, name: str, task: asyncio.Task[None]) -> None:
        self._loads.pop(name, None)
        if not task.cancelled():
            task.exception()  # the caller may be gone

    async def _load(self, name: str) -> None:
        record = self._manager.records.get(name)
        stale = record is not None and record.state == "failed" and record.loaded_by == BY
        if record is None or (stale and time.time() - record.changed_s > AGAIN_S):
            source = await self._find(name)
            if source is None:
                return
            self._check_number()
            await self._manager.submit(name, source, replace=record is not None, by=BY)
        while True:
            record = self._manager.records.get(name)
            if name in self._manager.loaded:
                return
            if record is None or record.state == "unloading":
                raise NoAdapter("it is being unloaded")
            if record.state not in WORKING and record.state != "ready":
                raise kind_of(record.error or "")(record.reason or f"it is {record.state}")
            if (failure := self._manager.failure(name)) is not None:
                raise failure
            await asyncio.sleep(_LOOK_S)

    def _check_number(self) -> None:
        mine = sum(record.loaded_by == BY for record in self._manager.records.values())
        if mine >= MOST:
            raise NoRoom(f"requests have registered {MOST} adapters; unload some")

    async def _find(self, name: str) -> str | None:
        """The source that has an adapter; None: none has.

        Raises:
            SourceAway: one did not answer, and none of the others has it.
        """
        since = self._nowhere.get(name)
        if not NAME.fullmatch(name) or (since and time.monotonic() - since < AGAIN_S):
            return None
        away: SourceAway | None = None
        async with self._looks:
            for text in self._candidates(name):
                try:
                    present = partial(self._manager.fetcher.present, parse_source(text))
                    if await in_thread(present):
                        return text
                except BadSource:
                    continue  # such a name is none of this source's
                except SourceAway as error:
                    away = error
        if away is not None:
            raise away
        self._nowhere[name] = time.monotonic()
        self._nowhere.move_to_end(name)
        while len(self._nowhere) > MOST:
            self._nowhere.popitem(last=False)
        return None

    def _candidates(self, name: str) -> Iterator[str]:
        for source in self._sources:
            owner, _, rest = name.partition("/")
            if source.rstrip("/") == f"hf://{owner}" and rest:
                yield f"hf://{name}"
            elif source.endswith("://"):
                yield f"{source}{name}"
            else:
                yield f"{source.rstrip('/')}/{name}"
