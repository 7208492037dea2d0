"""Adapter files that change under a server: at their source, in its store, in both."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.faults.asking import NAMED, Beside, answering
from tests.faults.conftest import Place
from tests.faults.table import RIGHT, Row
from tests.server.adapting.answers import TOLERANCE
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import (
    PATIENCE_S,
    ask,
    exact,
    load,
    record_of,
    tokens,
    unload,
)
from tests.server.adapting.test_kills import WEIGHTS
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(600)]

V0 = Kind((("v0", 1.0, None, None),))
BODY = V0.body({"v0": "x"}, as_model=True)


def altered(folder: Path) -> None:
    """Other numbers, of the same shapes: nothing but the digest tells."""
    tensors = {name: 1.5 * value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def cut_short(folder: Path) -> None:
    """Half of the weights."""
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def no_weights(folder: Path) -> None:
    """One file is deleted."""
    (folder / WEIGHTS).unlink()


def no_folder(folder: Path) -> None:
    """All is deleted."""
    shutil.rmtree(folder)


SPOILS = (altered, cut_short, no_weights, no_folder)


def spoil(server: Server, place: Place, how: Callable[[Path], None]) -> None:
    """Changes what is stored of `x`."""
    folder = place.seen(server) / record_of(server, "x")["digest"]
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    how(folder)


def hold(server: Server) -> None:
    """Keeps `x` in the engine: the users' other adapters would push it out."""
    assert server.post("/admin/adapters/x/pin", {}).status_code == 200
    assert record_of(server, "x")["here"]["resident"]


def evict(server: Server, oracle: Oracle) -> None:
    """Lets it go, and asks for others until it is gone: when it comes back its files are read."""
    assert server.post("/admin/adapters/x/unpin", {}).status_code == 200

    def gone() -> bool:
        for kind in NAMED.values():
            exact(server, kind.body({}), oracle(kind))
        return not record_of(server, "x")["here"]["resident"]

    until(gone, PATIENCE_S)


@pytest.fixture
def source(folders: dict[str, Path]) -> Path:
    """Where `x` comes from: a copy of `v0`."""
    folder = folders["a"].parent / "moving"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(folders["v0"], folder))


def right(server: Server, oracle: Oracle, row: Row, times: int = 5) -> None:
    """`x` answers as it did when it was loaded."""
    for _ in range(times):
        error = oracle(V0).error(*tokens(ask(server, BODY)))
        assert error < TOLERANCE, (row.fault, error)
        row.saw[RIGHT] += 1
        row.error = max(row.error, error)


def test_a_source_that_changes_does_not_change_what_was_loaded(
    server: Server, source: Path, oracle: Oracle, noted: Callable[[str], Row]
) -> None:
    row = noted("source-changed")
    load(server, "x", source)
    before = answering(server, oracle)
    with Beside(server, oracle) as users:
        hold(server)
        altered(source)
        right(server, oracle, row)
        evict(server, oracle)
        begun_s = time.monotonic()
        right(server, oracle, row, 1)
        row.normal_s = time.monotonic() - begun_s
        right(server, oracle, row)
        shutil.rmtree(source)
        evict(server, oracle)
        right(server, oracle, row)
    users.into(row)
    assert set(row.saw) == {RIGHT}
    row.loses("adapters", before, answering(server, oracle))
    unload(server, "x")


def test_stored_files_that_change_never_answer_and_are_fetched_again(
    server: Server, source: Path, place: Place, oracle: Oracle, noted: Callable[[str], Row]
) -> None:
    row = noted("store-changed")
    load(server, "x", source)
    before = answering(server, oracle)
    took_s = []
    with Beside(server, oracle) as users:
        for how in SPOILS:
            hold(server)
            spoil(server, place, how)
            right(server, oracle, row)  # from the engine's memory
            evict(server, oracle)
            begun_s = time.monotonic()
            right(server, oracle, row, 1)
            took_s.append(time.monotonic() - begun_s)
            assert record_of(server, "x")["here"]["failure"] is None
    row.normal_s = max(took_s)
    users.into(row)
    assert set(row.saw) == {RIGHT}
    row.loses("adapters", before, answering(server, oracle))
    unload(server, "x")


def test_where_the_source_has_changed_too_requests_are_refused_until_it_is_put_right(
    server: Server, source: Path, place: Place, folders: dict[str, Path], oracle: Oracle,
    noted: Callable[[str], Row],
) -> None:  # fmt: skip
    row = noted("both-changed")
    load(server, "x", source)
    before = answering(server, oracle)
    with Beside(server, oracle) as users:
        hold(server)
        altered(source)
        spoil(server, place, altered)
        right(server, oracle, row)
        evict(server, oracle)
        for stream in (False, True) * 3:
            answer = server.post("/v1/completions", {**BODY, "stream": stream})
            assert "has other content now" in answer.text, answer.text
            assert answer.status_code == 503 and answer.headers["retry-after"]
            row.saw["refused 503"] += 1
        shown = record_of(server, "x")
        assert shown["state"] == "ready" and "has other content now" in shown["here"]["failure"]
        assert answering(server, oracle) == before
        shutil.copytree(folders["v0"], source, dirs_exist_ok=True)
        mended_s = time.monotonic()
        until(lambda: server.post("/v1/completions", BODY).status_code == 200, PATIENCE_S)
        row.normal_s = time.monotonic() - mended_s
        right(server, oracle, row)
        assert record_of(server, "x")["here"]["failure"] is None
    users.into(row)
    assert set(row.saw) == {RIGHT, "refused 503"}, row.saw
    row.loses("adapters", before, answering(server, oracle))
    unload(server, "x")
