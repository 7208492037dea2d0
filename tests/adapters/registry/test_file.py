"""The registry of one server, in a file: durable, private, and never two servers on one."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from adapters.errors import Conflict, RegistryAway
from adapters.registry.connection import open_store
from adapters.registry.record import Content, Record
from adapters.registry.registry import Registry
from adapters.registry.store import NOWHERE, new_token
from tests.adapters.registry.kit import all_records

WRITER = """
    import asyncio, sys
    from pathlib import Path
    from adapters.registry.connection import open_store
    from adapters.registry.record import Content, Record
    from adapters.registry.store import NOWHERE, new_token

    async def main():
        async with open_store(Path(sys.argv[1])) as store:
            count = len((await store.look(NOWHERE)).records)
            while True:
                name = f"n{count}"
                await store.swap(name, "", Record(Content(name, "1", "/x"), "failed", 0.0, 0.0),
                                 new_token())
                print(name, flush=True)
                count += 1

    asyncio.run(main())
"""


def kept(folder: Path) -> set[str]:
    """The names in a registry that nobody uses."""

    async def look() -> set[str]:
        async with open_store(folder) as store:
            return set(await all_records(store))

    return asyncio.run(look())


def test_every_answered_write_survives_a_kill(tmp_path: Path) -> None:
    said: set[str] = set()
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "r")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        said |= {process.stdout.readline().strip() for _ in range(40)}
        process.kill()
        said |= set(process.stdout.read().split())
        process.stdout.close()
        process.wait()
        found = kept(tmp_path / "r")
        assert len(said) >= 40 and said <= found
        assert len(found - said) <= 1, "the one that was not answered"
        said = found


async def test_it_is_private_and_one_server_s_own(tmp_path: Path) -> None:
    async with open_store(tmp_path / "deep/er") as store:
        assert stat.S_IMODE((tmp_path / "deep/er").stat().st_mode) == 0o700
        for file in (tmp_path / "deep/er").iterdir():
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
        await Registry(store, "me").submit(Content("a", "1", "/a"))
        with pytest.raises(RegistryAway, match="another server uses this directory"):
            async with open_store(tmp_path / "deep/er"):
                pass
        assert (await store.read("a")) is not None
    async with open_store(tmp_path / "deep/er") as store:
        assert (await all_records(store)).keys() == {"a"}


async def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / "registry.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(RegistryAway, match="schema 99; this server knows 2"):
        async with open_store(tmp_path / "other"):
            pass
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "registry.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryAway, match="cannot be used: file is not a database"):
        async with open_store(tmp_path / "broken"):
            pass


async def test_a_write_whose_caller_left_is_whole(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        record = Record(Content("a", "1", "/a"), "failed", 0.0, 0.0)
        writing = asyncio.create_task(store.swap("a", "", record, new_token()))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await asyncio.sleep(0.2)
        seen = await all_records(store)
    async with open_store(tmp_path) as store:
        assert await all_records(store) == seen


async def test_verbs_are_as_in_redis(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        registry = Registry(store, "me")
        for i in range(8):
            await registry.submit(Content(f"n{i}", "1", "/x"))
        tried = await asyncio.gather(*(registry.pin(f"n{i}", True, most=3) for i in range(8)),
                                     return_exceptions=True)  # fmt: skip
        assert sum(isinstance(t, Record) for t in tried) == 3
        assert sum(isinstance(t, Conflict) for t in tried) == 5
        both = await asyncio.gather(
            *(registry.submit(Content("a", str(i), f"/{i}")) for i in range(5)),
            return_exceptions=True,
        )
        assert sum(isinstance(t, Record) for t in both) == 1
        removed = await registry.remove("a")
        assert await registry.forget(removed) and not await registry.forget(removed)
        found = await store.look(NOWHERE)
        assert found.whole and "a" not in found.records and len(found.records) == 8
