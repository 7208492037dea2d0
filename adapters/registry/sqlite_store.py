"""The registry of one server: a SQLite file in a folder that no other server may use.

The file is what survives; while a server runs, the truth is in its memory, since nobody else
writes. Each change is on disk (WAL, synced) before it can be seen. SQLite runs in one thread beside
the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from adapters.errors import RegistryAway
from adapters.registry.record import SCHEMA, Record, decode, encode
from adapters.registry.store import LOG, Changes, Position, Swapped, Wait, new_token

T = TypeVar("T")

_TABLE = (
    "CREATE TABLE IF NOT EXISTS records "
    "(name TEXT PRIMARY KEY, token TEXT NOT NULL, record BLOB NOT NULL) WITHOUT ROWID"
)


class SqliteStore:
    """See `Store`. Made by `opened`.

    Args:
        directory: made with mode 0700 if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._thread = ThreadPoolExecutor(1, "registry")
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._records: dict[str, Record] = {}
        self._position = Position(new_token(), 0, "")
        self._log: deque[str] = deque(maxlen=LOG)  # names, oldest first
        self._progress: dict[str, tuple[str, int]] = {}
        self._replica = ""
        self.registry = ""

    @classmethod
    @asynccontextmanager
    async def opened(cls, directory: Path) -> AsyncIterator[SqliteStore]:
        """A store with everything that was acknowledged before.

        Raises:
            RegistryAway: another server uses the directory, or the file cannot be used.
        """
        store = cls(directory)
        try:
            await store._in_thread(store._open)
            yield store
        finally:
            await store._in_thread(store._close)
            store._thread.shutdown()

    _database: sqlite3.Connection | None = None
    _lock: int | None = None

    def _open(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        self._take_lock()
        path = self._directory / "registry.sqlite"
        self._database = database = sqlite3.connect(path, isolation_level=None)
        path.chmod(0o600)
        database.execute("PRAGMA journal_mode = WAL")
        # Every answer is on disk first: writes are few, and one lost is a lost adapter.
        database.execute("PRAGMA synchronous = FULL")
        (schema,) = database.execute("PRAGMA user_version").fetchone()
        if schema not in (0, int(SCHEMA)):
            raise RegistryAway(f"the registry in {path} has schema {schema}; this server knows "
                               f"{SCHEMA}", field="registry.directory")  # fmt: skip
        database.execute(_TABLE)
        database.execute(f"PRAGMA user_version = {int(SCHEMA)}")
        rows = database.execute("SELECT name, token, record FROM records")
        self._records = {name: decode(raw, token) for name, token, raw in rows}

    def _take_lock(self) -> None:
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise RegistryAway("another server uses this directory", field="registry.directory",
                               value=str(self._directory)) from error  # fmt: skip
        self._lock = lock

    def _close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
        if self._lock is not None:
            os.close(self._lock)

    async def look(self, since: Position, *, replica: str = "", alive_ms: int = 0) -> Changes:
        """See `Store`."""
        if alive_ms:
            self._replica = replica
        alive = frozenset({self._replica} - {""})
        behind, total = self._position.writes - since.writes, len(self._records)
        if since.registry != self._position.registry or behind > len(self._log):
            return Changes(self._position, dict(self._records), True, total=total, alive=alive)
        names = [self._log[-i] for i in range(1, behind + 1)]
        records = {name: self._records.get(name) for name in names}
        return Changes(self._position, records, total=total, alive=alive)

    async def read(self, name: str) -> Record | None:
        """See `Store`."""
        return self._records.get(name)

    async def swap(
        self, name: str, old: str, new: Record | None, token: str, *,
        most_pins: int | None = None, into: str | None = None,
    ) -> Swapped:  # fmt: skip
        """See `Store`."""
        # Whoever asked may be cancelled: what is on disk must be in memory too.
        return await asyncio.shield(self._swap(name, old, new, token, most_pins))

    async def _swap(
        self, name: str, old: str, new: Record | None, token: str, most_pins: int | None
    ) -> Swapped:
        async with self._turn:
            seen = self._records.get(name)
            if (seen.token if seen else "") != old:
                return Swapped("other")
            if new is not None and new.pinned and not (seen and seen.pinned):
                pins = sum(record.pinned for record in self._records.values())
                if most_pins is not None and pins >= most_pins:
                    return Swapped("pins", pins)
            await self._in_thread(lambda: self._write(name, new, token))
            if new is None:
                del self._records[name]
            else:
                self._records[name] = msgspec.structs.replace(new, token=token)
            self._log.append(name)
            self._position = Position(self._position.registry, self._position.writes + 1, token)
            self._changed.set()
        return Swapped("done")

    def _write(self, name: str, new: Record | None, token: str) -> None:
        assert self._database is not None
        if new is None:
            self._database.execute("DELETE FROM records WHERE name = ?", (name,))
        else:
            self._database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)",
                                   (name, token, encode(new)))  # fmt: skip

    async def tell_progress(self, name: str, job: str, done_bytes: int) -> None:
        """See `Store`."""
        record = self._records.get(name)
        self._progress = {n: entry for n, entry in self._progress.items() if n in self._records}
        if record is not None and record.job == job:
            self._progress[name] = job, done_bytes

    async def progress(self, jobs: Mapping[str, str]) -> dict[str, int]:
        """See `Store`."""
        entries = {name: self._progress.get(name, ("", 0)) for name in jobs}
        return {name: done for name, (job, done) in entries.items() if job == jobs[name] and done}

    @asynccontextmanager
    async def hints(self) -> AsyncIterator[Wait]:
        """See `Store`."""

        async def wait(seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            self._changed.clear()

        yield wait

    async def leave(self, replica: str) -> None:
        """See `Store`."""
        self._replica = ""

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise RegistryAway(
                f"the registry's file in {self._directory} cannot be used: {error}",
                field="registry.directory",
            ) from error
