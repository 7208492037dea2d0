"""Makes this replica match the registry, and the registry match the requests.

Level-triggered: after every look at the registry each adapter that is not as its record says
gets one task, which takes steps (`decide`) until nothing is left to do. No step relies on having
seen the ones before, so a restart, a lost message or a Redis that was away need no other code.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from adapters.errors import AdapterError, BadAdapter, FilesLost, NoAdapter, RegistryAway, passing
from adapters.registry.decide import Step, decide
from adapters.registry.failure import Failure, fault_of, log_unexpected
from adapters.registry.feed import Feed
from adapters.registry.fetching import Fetching, SupersededError, still
from adapters.registry.loader import Loaded, Loader
from adapters.registry.mending import Mender
from adapters.registry.record import WORKING, Content, Record, check_name, check_version
from adapters.registry.registry import Registry
from adapters.registry.settling import Settling
from adapters.registry.store import Store
from adapters.sources.fetch import Fetcher
from adapters.sources.source import parse_source

logger = logging.getLogger("coxswain")

_RETRY_S = 5.0
_COLLECT_S = 600.0


class Manager:
    """One per replica, on its event loop. `run` is its life.

    Args:
        store: the registry's.
        fetcher: gets files.
        loader: the engine.
        parallel: adapters loaded, copied from local folders, or checked at the same time.
        downloads: adapters fetched from elsewhere at the same time.
        every_s: longest time between two looks at the registry, seconds.
        alive_s: after how many seconds of silence others take over this replica's work.
    """

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        loader: Loader,
        *,
        parallel: int = 2,
        downloads: int = 4,
        every_s: float = 3.0,
        alive_s: float = 10.0,
    ) -> None:
        replica = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._store = store
        self.registry = Registry(store, replica)
        self.feed = Feed(store, replica, self._see, every_s=every_s, alive_s=alive_s)
        self.records = self.feed.records
        """The registry as this replica saw it last."""
        self._fetcher, self._loader = fetcher, loader
        self._fetching = Fetching(fetcher, store, self._ours, downloads=downloads, copies=parallel)
        self._loading, self._checking = asyncio.Semaphore(parallel), asyncio.Semaphore(parallel)
        self._here: dict[str, Loaded] = {}
        self.loaded: Mapping[str, Loaded] = MappingProxyType(self._here)
        """Everything that answers here, by name."""
        self._failed: dict[str, Failure] = {}
        self._settling = Settling(self, self._steps)
        self._leaving: dict[asyncio.Task[None], Content] = {}
        self._mender = Mender(fetcher.store, self._named, self._fetching.folder)

    # What requests and the admin API ask.

    def lookup(self, name: str, version: str | None = None) -> Loaded:
        """The content that answers under a name on this replica now.

        Raises:
            NoAdapter: nothing, or another version.
            SourceAway, ServerFault: what the registry says answers could not be loaded here; that
                may pass.
        """
        loaded, record = self._here.get(name), self.records.get(name)
        if loaded is None or record is None or record.state == "unloading":
            failure = self.failure(name)
            kind = type(failure) if failure is not None and passing(failure) else NoAdapter
            raise no_adapter(name, failure or (f"it is {record.state}" if record else None), kind)
        if version is not None and loaded.content.version != version:
            raise NoAdapter("this version of the adapter is not loaded", field="model",
                            value=f"{name}@{version}", allowed=loaded.content.version)  # fmt: skip
        return loaded

    @property
    def fetcher(self) -> Fetcher:
        """What gets files."""
        return self._fetcher

    @property
    def unsettled(self) -> list[str]:
        """Adapters that may not be here as their records say; all others are."""
        return self._settling.unsettled

    async def progress(self, records: Iterable[Record]) -> dict[str, int]:
        """Bytes fetched so far, by name, of those that are being fetched."""
        jobs = {record.name: record.job for record in records if record.state == "downloading"}
        with contextlib.suppress(RegistryAway):
            return await self._store.progress(jobs) if jobs else {}
        return {}

    def failure(self, name: str) -> AdapterError | None:
        """Why this replica cannot load what the registry says is ready; None: no trouble."""
        if failed := self._failed.get(name):
            return failed.error
        here = self._here.get(name)
        why = self._mender.lost(here.content.digest) if here else None
        return FilesLost(why) if why else None

    async def mend(self, digest: str) -> None:
        """Sees to it that the files of a content that answers here are whole; see `Mender`.

        Raises:
            FilesLost: they are not, and cannot be fetched again.
        """
        await self._mender.mend(digest)

    async def submit(
        self,
        name: str,
        source: str,
        *,
        version: str = "1",
        stream: str = "base",
        replace: bool = False,
        pin: bool = False,
        most_pins: int | None = None,
        by: str = "",
        visible_to: tuple[str, ...] = (),
    ) -> Record:
        """Asks for an adapter and returns at once; its record goes to ready or failed.

        Raises:
            BadSource: the name, version or source cannot be used.
            Conflict: the name is taken, or `most_pins` are pinned already.
            RegistryAway: Redis does not answer.
        """
        place = parse_source(source)
        await asyncio.to_thread(self._fetcher.allowed.check, place)
        check_name(name, "name")
        check_version(version, "version")
        want = Content(name, version, str(place), stream, visible_to=visible_to)
        if not replace and name in self.records and place.kind == "local":
            # Cheap enough to see whether the folder still holds what is registered.
            with contextlib.suppress(AdapterError):
                fetched = await self._fetching.fetch(want.source)
                want = msgspec.structs.replace(want, digest=fetched.digest)
        record = await self.registry.submit(want, replace=replace, pin=pin, by=by,
                                            most_pins=most_pins)  # fmt: skip
        self._failed.pop(name, None)  # a new request may come after a repair
        await self.look()
        return record

    async def remove(self, name: str) -> Record:
        """Begins to unload everywhere; new requests here no longer find it from now on."""
        record = await self.registry.remove(name)
        await self.look()
        return record

    async def look(self) -> None:
        """Looks at the registry now instead of waiting for the feed."""
        with contextlib.suppress(RegistryAway):
            await self.feed.look()

    # ServerState.

    async def run(self) -> None:
        """Converges until it is cancelled; what is loaded stays with the engine."""
        await asyncio.to_thread(self._fetcher.store.sweep)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.feed.run())
                group.create_task(self._settling.run())
                group.create_task(self._collect())
        finally:
            await self._settling.end()
            for task in self._leaving:
                task.cancel()
            await asyncio.gather(*self._leaving, return_exceptions=True)
            with contextlib.suppress(RegistryAway):
                for record in list(self.records.values()):
                    if record.owner == self.registry.replica and record.state in WORKING:
                        await self.registry.release(record)
            await self.feed.leave()

    def _see(self, changed: list[str]) -> None:
        for name in changed:
            record, loaded = self.records.get(name), self._here.get(name)
            serving = record.serving if record else None
            if serving and loaded and serving.key == loaded.content.key:
                self._here[name] = Loaded(serving, loaded.folder)
        # What is pinned answers first, and has its place in the engine first.
        self._settling.look_at(sorted(changed, key=lambda n: n not in self.feed.pinned))

    def away(self) -> bool:
        """Whether the registry cannot be reached."""
        return self.feed.away is not None

    def rests(self, name: str) -> bool:
        """Whether an adapter with nothing to do has none until its record changes."""
        record = self.records.get(name)
        waits = record is not None and record.state in (*WORKING, "unloading")
        return not waits and name not in self._failed

    def next_step(self, name: str) -> Step:
        """The next step for an adapter."""
        record, here = self.records.get(name), self._here.get(name)
        failed = self._failed.get(name)
        if failed is not None:
            serving = record.serving.key if record and record.serving else None
            over = failed.again_s is not None and time.monotonic() > failed.again_s
            if failed.key != serving or over:
                del self._failed[name]
        alive = self.feed.alive if self.feed.trusts_leases else None
        return decide(record, here=here.content if here else None, replica=self.registry.replica,
                      alive=alive, can_follow=name not in self._failed)  # fmt: skip

    async def _steps(self, name: str) -> None:
        """Steps until there is nothing to do, or Redis is away: its return starts them again."""
        try:
            while (step := self.next_step(name)) != "nothing":
                record = self.records.get(name)
                if step == "drop":
                    self._leave(self._here.pop(name).content)
                    continue
                assert record is not None
                await self._step(step, record)
                if step != "follow":  # that changes nothing but this replica
                    await self.feed.look()
        except RegistryAway as error:
            logger.debug("adapter %s: %s", name, error)

    async def _step(self, step: Step, record: Record) -> None:
        match step:
            case "take":
                await self.registry.take(record)
            case "forget":
                # A record that is gone means memory that is given back.
                gone = [task for task, left in self._leaving.items() if left.name == record.name]
                await asyncio.gather(*gone)
                await self.registry.forget(record)
            case "work":
                await self._work(record)
            case "follow":
                await self._follow(record)

    # The steps.

    async def _work(self, job: Record) -> None:
        """Fetch, load, ready; the record says how far it is and, if it fails, why."""
        try:
            with contextlib.suppress(SupersededError):
                self._switch(await self._fetch_and_load(job))
        except RegistryAway:
            raise
        except Exception as error:
            fault = fault_of(job.name, error)
            await self.registry.advance(
                job, "failed", reason=str(fault), error=type(fault).__name__
            )

    async def _fetch_and_load(self, job: Record) -> Loaded:
        if job.state != "pending":
            # Redis was away in the middle of it.
            job = still(await self.registry.advance(job, "pending"))
        async with self._fetching.turn(job.want.source):
            job = still(await self.registry.advance(job, "downloading"))
            fetched = await self._fetching.fetch(job.want.source, job)
        want = msgspec.structs.replace(job.want, digest=fetched.digest)
        async with self._loading:
            job = still(await self.registry.advance(job, "loading", want=want))
            return await self._load(job, fetched.folder)

    async def _load(self, job: Record, folder: Path) -> Loaded:
        want, old = job.want, self._here.get(job.name)
        if old is not None and old.content.key == want.key and old.content.facts is not None:
            ready = still(await self.registry.ready(job, old.content.facts))
        else:
            facts = await self._loader.load(want, folder)
            try:
                ready = still(await self.registry.ready(job, facts))
            except BaseException:
                await self._loader.unload(want)
                raise
        assert ready.serving is not None
        return Loaded(ready.serving, folder)

    async def _follow(self, record: Record) -> None:
        """Loads what the registry says is serving: after a start, or what another loaded."""
        want = record.serving
        assert want is not None
        try:
            folder = self._fetching.stored(want)
            if folder is None:
                self._settling.checked(record.name)
                folder = await self._fetching.folder(want)
            try:
                await self._check(record, folder)
            except BadAdapter:  # are these still the bytes that were registered?
                folder = await self._fetching.folder(want)
                await self._check(record, folder)
        except Exception as error:
            fault = fault_of(record.name, error)
            again_s = time.monotonic() + _RETRY_S if passing(fault) else None
            self._failed[record.name] = Failure(want.key, fault, again_s)
            logger.warning("adapter %s cannot be served here: %s", record.name, fault)
            return
        self._switch(Loaded(want, folder))

    async def _check(self, record: Record, folder: Path) -> None:
        assert record.serving is not None
        async with self._checking:
            await self._loader.load(record.serving, folder, now=record.pinned)

    def _ours(self, job: Record) -> bool:
        record = self.records.get(job.name)
        return record is not None and record.job == job.job and record.state in WORKING

    def _named(self, digest: str) -> list[Content]:
        """What answers here with these bytes."""
        return [loaded.content for loaded in self._here.values() if loaded.content.digest == digest]

    def _switch(self, new: Loaded) -> None:
        """From here on new requests get the new content; the old one goes when they are done."""
        old = self._here.get(new.content.name)
        self._here[new.content.name] = new
        if old is not None and old.content.key != new.content.key:
            self._leave(old.content)

    def _leave(self, content: Content) -> None:
        """Begins to unload. The requests that run on it may take long: nothing waits for them."""
        task = asyncio.create_task(self._loader.unload(content), name=f"unload {content.name}")
        self._leaving[task] = content
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        log_unexpected(self._leaving.pop(task).name, task)

    async def _collect(self) -> None:
        while True:
            await asyncio.sleep(_COLLECT_S)
            await self.collect()

    async def collect(self, older_than_s: float = 3600.0) -> list[str]:
        """Deletes stored contents that no record refers to; the digests that are gone.

        Args:
            older_than_s: younger ones stay: another replica may be about to register them.
        """
        if self.feed.away is not None:
            return []
        store = self._fetcher.store
        return await asyncio.to_thread(store.collect, self.digests(), older_than_s=older_than_s)

    def digests(self) -> frozenset[str]:
        """The contents that must stay in the store, as far as this replica knows."""
        recorded = [record.digests() for record in self.records.values()]
        used = [*(loaded.content for loaded in self._here.values()), *self._leaving.values()]
        return frozenset().union(*recorded, {c.digest for c in used if c.digest})


def no_adapter(name: str, why: object = None, kind: type[AdapterError] = NoAdapter) -> AdapterError:
    """That a name does not answer, to be raised.

    Args:
        name: as the request wrote it.
        why: None: there is none of this name.
        kind: the class.
    """
    return kind(f"no adapter of this name is ready here: {why or 'there is none'}", field="model",
                value=name)  # fmt: skip
