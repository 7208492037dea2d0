"""Kills of servers in the middle of loads; ends, and starts that fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.sources.servers import Server as Web
from tests.adapters.sources.servers import folder
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import (
    PATIENCE_S,
    configuration,
    exact,
    load,
    record_of,
    records_on_disk,
    runs,
    serving,
    settled,
    submit,
)
from tests.server.live import Server
from tests.server.reading import last_line
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

WEIGHTS = "adapter_model.safetensors"
ONE = {name: Kind(((name, 1.0, None, None),)) for name in ("a", "v0", "v1", "v2")}
PACK = Kind((("pack", 1.0, 2, 1.0),))


@contextmanager
def slow(web: Web, path: Path, name: str) -> Iterator[str]:
    """A source that sends half of the weights and holds the rest back until the block ends."""
    free = threading.Event()
    raw = (path / WEIGHTS).read_bytes()

    def hold(request: Any) -> None:
        request.send_response(200)
        request.send_header("content-length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw[: len(raw) // 2])
        request.wfile.flush()
        free.wait(PATIENCE_S)
        request.wfile.write(raw[len(raw) // 2 :])

    web.answers |= folder(path, f"/{name}")
    web.answers[f"/{name}/{WEIGHTS}"] = hold
    try:
        yield f"{web.url}/{name}"
    finally:
        free.set()
        web.answers |= folder(path, f"/{name}")


def kill(*processes: int) -> None:
    """As the kernel does when memory runs out."""
    for process in processes:
        os.kill(process, signal.SIGKILL)


def answers(server: Server, oracle: Oracle, **names: str) -> None:
    """Each name answers with its content."""
    exact(server, PACK.body({}), oracle(PACK))
    for name, content in names.items():
        exact(server, ONE[content].body({content: name}, as_model=True), oracle(ONE[content]))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What survives the kills."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def config(models: Path, state: Path, web: Web) -> dict[str, Any]:
    """Three slots for more adapters."""
    return configuration(models, state, remotes=[web.url], max_loaded=3)


@pytest.mark.nightly
def test_kills_in_the_middle_of_loads_lose_nothing(
    models: Path, folders: dict[str, Path], oracle: Oracle, web: Web, config: dict[str, Any],
    state: Path,
) -> None:  # fmt: skip
    # 1. The server, while it downloads one and loads another into the engine.
    with serving(Server(models, config)) as first:
        load(first, "good", folders["v0"], pin=True)
        load(first, "pack", folders["pack"])
        engine = first.engine_process()
        with slow(web, folders["v1"], "late") as source:
            submit(first, "late", source)
            until(lambda: record_of(first, "late")["state"] == "downloading", PATIENCE_S)
            asked = first.post("/v1/completions", ONE["v1"].body({"v1": "late"}))
            assert asked.status_code == 404 and "downloading" in asked.text
            os.kill(engine, signal.SIGSTOP)
            submit(first, "half", folders["a"])
            until(lambda: record_of(first, "half")["state"] == "loading", PATIENCE_S)
            kill(first.process.pid)
            first.process.wait()
            os.kill(engine, signal.SIGCONT)
        # An engine without its server is of no use, and holds all the memory.
        until(lambda: not runs(engine), PATIENCE_S)
    with serving(Server(models, config)) as second:
        shown = record_of(second, "good")
        assert shown["state"] == "ready" and shown["pinned"] and shown["here"]["resident"]
        answers(second, oracle, good="v0")
        for name in ("late", "half"):
            record = settled(second, name)
            assert record["state"] == "ready", record
        answers(second, oracle, good="v0", late="v1", half="a")
        assert list((state / "adapters" / ".tmp").iterdir()) == []
        assert {r["state"] for r in records_on_disk(state).values()} == {"ready"}
        # 2. An orderly end while it downloads.
        with slow(web, folders["b"], "never") as source:
            submit(second, "never", source)
            until(lambda: record_of(second, "never")["state"] == "downloading", PATIENCE_S)
            begun = time.monotonic()
            assert second.stop() == 0
            ended_s = time.monotonic() - begun
        print(f"\nended {ended_s:.1f} s after SIGTERM in the middle of a download")
        assert ended_s < 20  # not when the source gives up
        assert last_line(second) == "coxswain: ended in order"
        assert "Traceback" not in second.log.read_text()


def test_a_preload_that_fails_ends_the_start_and_says_why(
    models: Path, folders: dict[str, Path], web: Web, tmp_path: Path
) -> None:
    web.answers |= folder(folders["f"], "/other-base")
    preload = [
        {"name": "sound", "source": "./adapters/a"},
        {"name": "other", "source": f"{web.url}/other-base"},
    ]
    config = configuration(models, tmp_path, remotes=[web.url], preload=preload)
    config["streams"], config["profiles"] = {}, {}
    server = Server(models, config)
    assert server.process.wait(PATIENCE_S * 2) == 1
    said = server.log.read_text()
    assert "coxswain: adapters.preload.1 (other): " in said and "adapters.preload.0" not in said
    assert last_line(server) == "coxswain: cannot start"
    assert "Traceback" not in said
