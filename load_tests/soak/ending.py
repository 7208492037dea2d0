"""How a soak ends: is the server idle, does it give everything back, does it end in order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from adapters.sources.store import ContentStore
from load_tests.soak.watch import Watch, recorded
from tests.server.live import Server

PATIENCE_S = 120.0


def idle(watch: Watch) -> dict[str, float]:
    """The first sample in which nothing runs, or the last one when patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = watch.sample()
        busy = any(found[k] for k in ("running", "waiting", "in_flight", "kv_used", "staging"))
        if not busy or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def unload_all(server: Server) -> dict[str, Any]:
    """Unloads every adapter; how the engine then stands.

    Raises:
        AssertionError: one was still there when patience was over.
    """
    deadline = time.monotonic() + PATIENCE_S
    while records := server.get("/admin/adapters").json()["adapters"]:
        assert time.monotonic() < deadline, records
        for record in records:
            if record["state"] in ("ready", "failed"):
                server.delete(f"/admin/adapters/{record['name']}")
        time.sleep(0.5)
    found: dict[str, Any] = server.get("/admin/adapters").json()["engine"]
    return found


def end(server: Server, watch: Watch, state: Path, known: set[str]) -> dict[str, Any]:
    """Ends the server; what was found on the way, as far as it went.

    Args:
        server: whose clients have gone.
        watch: of it.
        state: its folder.
        known: digests that the store may hold.
    """
    found: dict[str, Any] = {"idle": idle(watch), "engine": unload_all(server)}
    store = ContentStore(state / "adapters")
    found["unloaded"] = watch.sample()
    found["recorded"] = recorded(state)
    found["digests"] = sorted(store.digests())
    found["strange"] = sorted(store.digests() - known)
    found["staging"] = found["unloaded"]["staging"]
    family = [process for _, process in watch.family()]
    found["status"] = server.stop()
    _, alive = psutil.wait_procs(family, timeout=10)
    found["left"] = [
        f"{one.pid} {one.name()}" for one in alive if one.status() != psutil.STATUS_ZOMBIE
    ]
    log = server.log.read_text().strip()
    found["last_line"] = log.splitlines()[-1]
    found["tracebacks"] = log.count("Traceback")
    return found
