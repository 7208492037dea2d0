"""Servers with adapters, and what tests ask of them over HTTP."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from tests.server.adapting.answers import TOLERANCE, Expected
from tests.server.live import Server, document
from tests.server.watch import until

PATIENCE_S = 120.0
"""For whatever has to happen: other work may share the cores."""


def configuration(models: Path, state: Path, **section: Any) -> dict[str, Any]:
    """A small server: two companions, four slots; `section` changes `adapters`."""
    adapters = {"roots": ["./adapters"], "max_loaded": 4, "max_rank": 24, **section}
    found = document(adapters=adapters, registry={"directory": str(state)})
    del found["profiles"]["own"], found["streams"]["twin"]
    found["engine"]["kv_cache_memory_bytes"] = 64 * 1024 * 1024
    # Small blocks: prompts fill some, and the prefix cache comes into play.
    found["engine"]["block_size"] = 32
    return found


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A server that is ready, and its end; also of the engine process of one that was killed."""
    engine: int | None = None
    try:
        server.wait_ready()
        engine = server.engine_process()
        yield server
    finally:
        server.stop()
        if engine is not None:
            until(lambda: not runs(engine), PATIENCE_S)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def submit(server: Server, name: str, source: object, **more: Any) -> httpx.Response:
    """POST /admin/adapters."""
    return server.post("/admin/adapters", {"name": name, "source": str(source), **more})


def record_of(server: Server, name: str) -> dict[str, Any]:
    """GET /admin/adapters/{name}."""
    answer = server.get(f"/admin/adapters/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def settled(server: Server, name: str) -> dict[str, Any]:
    """The record once it is ready or failed."""

    def look() -> dict[str, Any] | None:
        record = record_of(server, name)
        return record if record["state"] in ("ready", "failed") else None

    return until(look, PATIENCE_S)


def load(server: Server, name: str, source: object, **more: Any) -> dict[str, Any]:
    """Loads an adapter; its record, ready."""
    answer = submit(server, name, source, **more)
    assert answer.status_code == 202, answer.text
    record = settled(server, name)
    assert record["state"] == "ready", record
    return record


def load_all(server: Server, folders: dict[str, Path]) -> None:
    """`a`, `b`, `pack`, and `f` on the stream `chat`."""
    for name in ("a", "b", "pack", "f"):
        load(server, name, folders[name], stream="chat" if name == "f" else "base")


def unload(server: Server, name: str) -> None:
    """Unloads an adapter and waits until nothing is left of it."""
    answer = server.delete(f"/admin/adapters/{name}")
    assert answer.status_code == 202, answer.text
    until(lambda: server.get(f"/admin/adapters/{name}").status_code == 404, PATIENCE_S)


def listing(server: Server) -> dict[str, Any]:
    """GET /admin/adapters."""
    found: dict[str, Any] = server.get("/admin/adapters").json()
    return found


def tokens(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of a completion."""
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def ask(server: Server, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """One completion, answered."""
    answer = server.post("/v1/completions", body, **options)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def exact(server: Server, body: dict[str, Any], right: Expected, **options: Any) -> None:
    """A completion is the right one."""
    error = right.error(*tokens(ask(server, body, **options)))
    assert error < TOLERANCE, (error, body)


def streamed(lines: list[str]) -> dict[str, Any]:
    """The completion that a stream's events make up."""
    ids: list[int] = []
    logprobs: list[float] = []
    found: dict[str, Any] = {}
    assert [line for line in lines if line][-1] == "data: [DONE]", lines[-3:]
    for line in lines:
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        if "steering" in event:
            found["steering"] = event["steering"]
        for choice in event["choices"]:
            ids += choice.get("token_ids") or []
            if choice.get("logprobs"):
                logprobs += choice["logprobs"]["token_logprobs"]
    return {**found, "choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}]}


def records_on_disk(state: Path) -> dict[str, dict[str, Any]]:
    """What the registry of a server without Redis holds; the server may run."""
    path = state / "registry" / "registry.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT name, record FROM records").fetchall()
    return {name: json.loads(record) for name, record in rows}


def memory(server: Server) -> int:
    """Resident bytes of the server and its engine."""
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in family)
