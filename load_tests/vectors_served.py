"""Vectors on a server: loaded while requests decode, and many of them at the same time.

Of each load `POST /admin/adapters` is timed until the adapter is `ready`, and the pauses between
the tokens of requests that run meanwhile. Then a server's worth of vectors is loaded, each into a
slot of its own, and every one of them answers a request.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import yaml

from load_tests.adapter_files import write_vector
from load_tests.load_models import write_random
from load_tests.shapes import BASE, VOCAB
from load_tests.soak.watch import memory
from load_tests.with_server import running_server

CLIENTS, LOADS, DRAWN = 8, 20, 900
"""Requests that decode, vectors loaded meanwhile, and tokens of such a request."""

MOST = 1024 - LOADS
"""Slots that an engine can have, without those of the hot loads."""

TINY = {"hidden_size": 128, "num_hidden_layers": 2, "heads": 4, "intermediate_size": 192}

Span = tuple[float, float]


@dataclass
class Client(threading.Thread):
    """A request that decodes, and when each of its tokens came.

    Args:
        url: of the server.
        seed: of its prompt.
    """

    url: str
    seed: int
    times: list[float] = field(default_factory=list)
    failed: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Reads the stream until `over`."""
        body = {**_body(self.seed), "max_tokens": DRAWN, "stream": True}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as read:
                read.raise_for_status()
                for line in read.iter_lines():
                    if '"error"' in line:
                        self.failed = line
                    if line.startswith("data: {"):
                        self.times.append(time.perf_counter())
                    if self.over.is_set():
                        return
        except httpx.HTTPError as error:
            self.failed = repr(error)
        self.failed = self.failed or "its text ended before the loads did"

    def gaps(self, span: Span) -> list[float]:
        """Seconds between two tokens, of which a part lies in a span of time."""
        pairs = itertools.pairwise(self.times)
        return [end - begin for begin, end in pairs if begin < span[1] and span[0] < end]


def _body(seed: int) -> dict[str, Any]:
    ids = [5 + (7919 * seed + 31 * i) % (VOCAB - 10) for i in range(32)]
    return {"model": "base", "prompt": ids, "temperature": 0, "ignore_eos": True}


def load(client: httpx.Client, name: str, source: Path) -> Span:
    """Loads a vector; when it was asked for, and when it was ready.

    Raises:
        RuntimeError: it failed.
    """
    begun = time.perf_counter()
    body = {"name": name, "source": str(source)}
    record = client.post("/admin/adapters", json=body).raise_for_status().json()
    while record["state"] != "ready":
        if record["state"] == "failed":
            raise RuntimeError(f"{name}: {record['reason']}")
        time.sleep(0.002)
        record = client.get(f"/admin/adapters/{name}").raise_for_status().json()
    return begun, time.perf_counter()


def ask(client: httpx.Client, name: str, seed: int, drawn: int) -> tuple[float, ...]:
    """The log-probabilities of a reply with a vector."""
    more = {"adapters": [{"name": name}], "max_tokens": drawn, "logprobs": 0}
    answer = client.post("/v1/completions", json={**_body(seed), **more}).raise_for_status()
    return tuple(answer.json()["choices"][0]["logprobs"]["token_logprobs"])


def hot_loads(url: str, folder: Path, shape: dict[str, int], count: int) -> str:
    """What loads do to requests that decode, and how long they take."""
    running = [Client(url, i) for i in range(CLIENTS)]
    for one in running:
        one.start()
    while not all(one.times for one in running) and not any(one.failed for one in running):
        time.sleep(0.05)
    begun = time.perf_counter()
    time.sleep(0.15 * count)
    spans: list[Span] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for i in range(count):
            source = write_vector(folder / f"hot-{i}", 10_000 + i, shape)
            spans.append(load(client, f"hot-{i}", source))
            ask(client, f"hot-{i}", 100 + i, 2)
            time.sleep(0.1)
    failed = [one.failed for one in running if one.failed]
    for one in running:
        one.over.set()
    for one in running:
        one.join(30)
    # Later, what comes between two loads pays for the prompt of a request for the new vector.
    quiet = [gap for one in running for gap in one.gaps((begun, spans[0][0]))]
    loading = [gap for one in running for span in spans for gap in one.gaps(span)]
    stall = max(loading, default=0.0) - statistics.median(quiet)
    return f"""\
hot-load of {count} vectors while {CLIENTS} requests decode, ms:
- from POST to `ready`: {_spread([end - start for start, end in spans])}
- between two tokens: {_spread(quiet)} before the loads, {_spread(loading)} during one;
  so a stall of {1e3 * stall:.1f} at most
- failed requests: {len(failed)} of {CLIENTS + count} {failed[:1] or ""}"""


def _spread(seconds: Sequence[float]) -> str:
    found = [1e3 * second for second in (statistics.median(seconds), min(seconds), max(seconds))]
    return "{:.1f} ({:.1f} to {:.1f})".format(*found)


def many(url: str, folder: Path, shape: dict[str, int], count: int) -> str:
    """Loads so many vectors, and asks each of them."""
    sources = {f"many-{i}": write_vector(folder / f"many-{i}", i, shape) for i in range(count)}
    local = threading.local()

    def client() -> httpx.Client:
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=url, timeout=120)
        found: httpx.Client = local.client
        return found

    before, begun = _memory(), time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: load(client(), *item), sources.items()))
    loaded, after = time.perf_counter(), _memory()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: ask(client(), name, 1, 4), sources))
    asked = time.perf_counter()
    engine = httpx.get(f"{url}/admin/adapters", timeout=60).json()["engine"]
    return f"""\
{count} vectors, each in a slot of its own:
- loaded in {loaded - begun:.1f} s, four at a time; the server's processes grew by \
{(after - before) / 2**20:.0f} MiB
- each answered a request of 4 tokens, 16 at a time, in {asked - loaded:.1f} s: \
{len(set(found))} different replies
- the engine holds {engine["taken"]}, {engine["bytes"] / 2**20:.1f} MiB; {engine["loads"]} loads, \
{engine["evictions"]} evictions"""


def _memory() -> float:
    """Bytes of the processes that this one has started, and theirs."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            found += memory(process.pid)["own"]
    return found


@contextlib.contextmanager
def serving(folder: Path, shape: dict[str, int], slots: int, *, eager: bool) -> Iterator[str]:
    """A server of a random base with slots for so many vectors; its URL."""
    write_random(folder / "base", shape, VOCAB, 1)
    (folder / "vectors").mkdir()
    # A slot has room in every layer for the largest rank: a vector has 1.
    section = {"roots": ["./vectors"], "vectors": True, "max_rank": 1, "max_loaded": slots}
    engine: dict[str, Any] = {
        "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 64,
        "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 1 << 30, "enforce_eager": eager,
    }  # fmt: skip
    config = {"model": "./base", "served_model_name": "base", "adapters": section, "engine": engine}
    file = folder / "server.yaml"
    file.write_text(yaml.safe_dump(config))
    with running_server(file) as url:
        yield url


def run(folder: Path, count: int, *, small: bool = False) -> str:
    """What was measured, as text.

    Args:
        folder: for the model and the vectors.
        count: vectors that are loaded at the same time, at most `MOST`.
        small: a tiny model, not compiled, and fewer loads: to see that it runs.
    """
    shape, loads = (TINY, 5) if small else (BASE, LOADS)
    with serving(folder, shape, count + loads, eager=small) as url:
        vectors = folder / "vectors"
        hot = hot_loads(url, vectors, shape, loads)
        return f"{hot}\n\n{many(url, vectors, shape, count)}"
