"""The adapter store's disk is full: the kernel refuses the write, at a size known before or not."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.adapters.make import make_lora
from tests.adapters.sources.servers import Server as Web
from tests.faults.asking import NAMED, Beside, answering
from tests.faults.conftest import Place
from tests.faults.table import Row
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import (
    PATIENCE_S,
    exact,
    load,
    record_of,
    settled,
    submit,
    unload,
)
from tests.server.adapting.test_kills import WEIGHTS, slow
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(600)]

BIG = Kind((("large", 1.0, None, None),))
V0 = Kind((("v0", 1.0, None, None),))


@pytest.fixture(scope="module")
def big(models: Path, folders: dict[str, Path]) -> Path:
    """An adapter larger than the others."""
    return make_lora(folders["a"].parent / "big", models / "base", seed=60, r=24)


def full(server: Server, place: Place, leave: int) -> None:
    """Fills the server's file system up to so many bytes."""
    filler = place.seen(server) / "filler"
    with filler.open("ab") as file:
        while True:
            free = _free(place.seen(server)) - leave
            if free <= 0:
                return
            file.write(bytes(min(free, 1 << 16)))
            file.flush()


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@contextmanager
def no_longer_files(server: Server, most: int) -> Iterator[None]:
    """The server's files may not become longer than `most` bytes."""
    pid, kind = server.process.pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, kind)
    assert server.log.stat().st_size < most // 2, "its log must still have room"
    resource.prlimit(pid, kind, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


def nothing_is_left(server: Server, place: Place, before: set[str]) -> None:
    """The store holds what it held, and nothing half-written."""
    store = place.seen(server)
    until(lambda: not list((store / ".tmp").iterdir()), PATIENCE_S)
    assert {path.name for path in store.iterdir()} - {".tmp", "filler"} == before


def refused(server: Server, name: str, place: Place, words: str) -> None:
    """A load failed, and says why and where."""
    record = settled(server, name)
    assert record["state"] == "failed", record
    assert f"the store {place.folder} has no room" in record["reason"], record
    assert words in record["reason"], record


def test_on_a_full_disk_loads_fail_with_the_reason_and_all_else_goes_on(
    server: Server, place: Place, web: Web, folders: dict[str, Path], big: Path, oracle: Oracle,
    noted: Callable[[str], Row],
) -> None:  # fmt: skip
    if not place.prefix:
        pytest.skip(f"no file system of the server's own: {place.reason}")
    row = noted("disk-full")
    oracle.folders["large"] = big
    oracle(BIG)
    load(server, "changing", folders["v0"])
    store, size = place.seen(server), (big / WEIGHTS).stat().st_size
    kept = {path.name for path in store.iterdir()} - {".tmp"}
    before = answering(server, oracle)
    with Beside(server, oracle) as users:
        # The size is announced, and is more than is free.
        full(server, place, leave=size // 2)
        submit(server, "large", big)
        refused(server, "large", place, "bytes are free")
        # Another replaces what serves.
        submit(server, "changing", big, replace=True)
        refused(server, "changing", place, "bytes are free")
        exact(server, V0.body({"v0": "changing"}), oracle(V0))
        # The disk becomes full in the middle of the copy: the write itself fails.
        (store / "filler").unlink()
        with slow(web, big, "full") as source:
            submit(server, "large", source)
            until(lambda: record_of(server, "large")["progress_bytes"] >= size // 2, PATIENCE_S)
            full(server, place, leave=0)
        refused(server, "large", place, "No space left on device")
        nothing_is_left(server, place, kept)
        row.saw["loads refused (the reason names the store)"] += 3
        assert answering(server, oracle) == before
        (store / "filler").unlink()
        freed_s = time.monotonic()
        load(server, "large", big)
        exact(server, BIG.body({}), oracle(BIG))
        row.normal_s = time.monotonic() - freed_s
    users.into(row)
    assert set(row.saw) == {"right", "loads refused (the reason names the store)"}, row.saw
    row.loses("adapters", before, answering(server, oracle))
    assert before == set(NAMED)
    for name in ("large", "changing"):
        unload(server, name)


def test_where_files_may_not_grow_loads_fail_with_the_reason_and_all_else_goes_on(
    server: Server, place: Place, folders: dict[str, Path], big: Path, oracle: Oracle,
    noted: Callable[[str], Row],
) -> None:  # fmt: skip
    row = noted("file-limit")
    oracle.folders["large"] = big
    oracle(BIG)
    kept = {path.name for path in place.seen(server).iterdir()} - {".tmp"}
    before = answering(server, oracle)
    with Beside(server, oracle) as users:
        with no_longer_files(server, (big / WEIGHTS).stat().st_size - 1000):
            submit(server, "large", big)
            refused(server, "large", place, "File too large")
            nothing_is_left(server, place, kept)
            row.saw["loads refused (the reason names the store)"] += 1
            assert answering(server, oracle) == before
        freed_s = time.monotonic()
        load(server, "large", big)
        exact(server, BIG.body({}), oracle(BIG))
        row.normal_s = time.monotonic() - freed_s
    users.into(row)
    row.loses("adapters", before, answering(server, oracle))
    unload(server, "large")
