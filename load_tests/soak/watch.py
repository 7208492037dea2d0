"""Looks at a running server from outside: memory, files, threads, queue, store, registry."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

Sample = dict[str, float]
"""`at` (Unix seconds), `own.ROLE`, `rss.ROLE`, `fds.ROLE`, `threads.ROLE`, sums of these under the
role `all`, what `GAUGES` has, `store`, `staging`, `records`, `registry_bytes`, `log_bytes`."""

GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_used",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "output_tokens",
    "coxswain_in_flight": "in_flight",
    "coxswain_adapter_slots_taken": "sets_held",
    "coxswain_adapter_loads_total": "set_loads",
    "coxswain_adapter_evictions_total": "set_evictions",
    "coxswain_engine_silent_seconds": "engine_silent_s",
    "coxswain_steps_total": "steps",
}
"""Series of /metrics, summed over their labels."""


class Watch(threading.Thread):
    """Samples in the background until it is ended.

    Args:
        pid: of the server; its children count too.
        url: of the server.
        state: the folder `registry.directory`.
        log: the server's log.
        every_s: between two samples.
    """

    def __init__(self, pid: int, url: str, state: Path, log: Path, every_s: float) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.problems: list[str] = []
        self._server, self._url, self._state, self._log = psutil.Process(pid), url, state, log
        self._every_s, self._over = every_s, threading.Event()

    def run(self) -> None:
        """Samples, regularly."""
        while not self._over.wait(self._every_s):
            try:
                self.samples.append(self.sample())
            except (httpx.HTTPError, sqlite3.Error, psutil.Error, OSError) as error:
                self.problems.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}")

    def end(self) -> None:
        """No more samples."""
        self._over.set()
        self.join()

    def family(self) -> Iterator[tuple[str, Any]]:
        """(role, process) of the server and its children."""
        yield "api", self._server
        for process in self._server.children(recursive=True):
            try:
                name = process.name()
            except psutil.NoSuchProcess:
                continue  # it ended since the list was made
            yield "engine" if "EngineCor" in name else "other", process

    def sample(self) -> Sample:
        """One look.

        Raises:
            httpx.HTTPError, sqlite3.Error, psutil.Error, OSError: something did not answer.
        """
        found: Sample = {"at": time.time()}
        for role, process in self.family():
            try:
                figures = {
                    **memory(process.pid),
                    "fds": process.num_fds(),
                    "threads": process.num_threads(),
                }
            except (
                psutil.NoSuchProcess,
                psutil.ZombieProcess,
                FileNotFoundError,
                ProcessLookupError,
            ):
                continue  # one that renders a template, say
            for figure, value in figures.items():
                for who in (role, "all"):
                    found[f"{figure}.{who}"] = found.get(f"{figure}.{who}", 0) + value
        return found | self._metrics() | self._stored()

    def _metrics(self) -> Sample:
        found = dict.fromkeys(GAUGES.values(), 0.0)
        for line in httpx.get(f"{self._url}/metrics", timeout=30).text.splitlines():
            match = re.match(r"([\w:]+)(?:\{.*\})? (\S+)$", line)
            if match and match[1] in GAUGES:
                found[GAUGES[match[1]]] += float(match[2])
        return found

    def _stored(self) -> Sample:
        store = self._state / "adapters"
        registry = self._state / "registry"
        return {
            "store": sum(1 for one in store.iterdir() if len(one.name) == 64),
            "staging": sum(1 for _ in (store / ".tmp").iterdir()),
            "records": float(len(recorded(self._state))),
            "registry_bytes": float(sum(one.stat().st_size for one in registry.iterdir())),
            "log_bytes": float(self._log.stat().st_size),
        }


def memory(pid: int) -> dict[str, float]:
    """Bytes of a process: `rss`, and `own`, what no file backs.

    Pages of libraries are not `own`: whether they are resident, and with how many they are shared,
    depends on the other processes of the machine.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {key: float(kib) * 1024 for key, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}
    return {"rss": found["Rss"], "own": found["Pss_Anon"] + found["Pss_Shmem"]}


def recorded(state: Path) -> list[str]:
    """The names in the registry of a server without Redis."""
    path = state / "registry" / "registry.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return [name for (name,) in database.execute("SELECT name FROM records ORDER BY name")]
