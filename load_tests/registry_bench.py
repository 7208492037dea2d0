"""Thousands of adapters, two servers, one Redis: `python -m load_tests.registry_bench`.

Makes a tiny base and as many tiny adapters as asked, registers them in a Redis of its own, starts
two servers, and measures: the start, lists, new adapters, replacements, unloads, and a download
that lasts. Of every part it tells the longest pause of the servers' event loops.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import yaml
from safetensors.numpy import save_file

from adapters.registry.address import parse_address
from adapters.registry.connection import open_store
from adapters.registry.record import Content, Facts
from adapters.registry.registry import Registry
from adapters.sources.store import ContentStore
from tests.adapters.sources.servers import Server as Web
from tests.adapters.sources.servers import folder
from tests.models import make_model
from tests.redis_server import RedisServer, free_port

MODULE = "model.layers.0.self_attn.q_proj"
SOME = 20
"""Adapters that are added, replaced and unloaded, one after the other."""

PATIENCE_S = 1800.0


def make_adapter(path: Path, shape: tuple[int, int], value: float) -> Path:
    """A LoRA of rank 1 on one layer."""
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix, (out, into) = f"base_model.model.{MODULE}.lora_", shape
    save_file(
        {f"{prefix}A.weight": np.full((1, into), value, np.float32),
         f"{prefix}B.weight": np.ones((out, 1), np.float32)},
        path / "adapter_model.safetensors",
    )  # fmt: skip
    return path


async def register(url: str, store: ContentStore, count: int, shape: tuple[int, int]) -> None:
    """Puts adapters into the store and the registry, as a server does that has loaded them."""
    async with open_store(parse_address(url)) as records:
        registry = Registry(records, "bench")

        async def one(i: int) -> None:
            name = f"adapter-{i:05d}"
            with store.staging() as staged:
                made = make_adapter(staged / "a", shape, 1e-3 * (i + 1))
                digest, _ = store.keep(made)
            job = await registry.submit(Content(name, "1", f"hf://bench/{name}"))
            await registry.advance(job, "downloading")
            want = msgspec.structs.replace(job.want, digest=digest)
            await registry.advance(job, "loading", want=want)
            await registry.ready(job, Facts("lora", "", sum(shape) * 4))

        for i in range(0, count, 50):
            await asyncio.gather(*(one(j) for j in range(i, min(i + 50, count))))


@dataclass
class Served:
    """One server.

    Args:
        state: its folder.
        config: its configuration.
    """

    state: Path
    config: dict[str, Any]
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        """Starts it; returns at once."""
        self.state.mkdir(parents=True, exist_ok=True)
        path = self.state / "server.yaml"
        path.write_text(yaml.safe_dump(self.config))
        command = [sys.executable, "-m", "load_tests.registry_served", str(self.state / "pauses"),
                   "serve", str(path), "--port", str(self.port)]  # fmt: skip
        self.log = (self.state / "log").open("w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def ready(self) -> bool:
        """Whether it is."""
        if self.process.poll() is not None:
            raise RuntimeError((self.state / "log").read_text()[-3000:])
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def opened(self) -> tuple[float, float]:
        """When it began to open its adapters, and when it had them."""
        begun, ended = (self.state / "pauses.start").read_text().split()
        return float(begun), float(ended)

    def stop(self) -> None:
        """Ends it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self.log.close()

    def shown(self, name: str) -> dict[str, Any] | None:
        """An adapter's record; None: there is none."""
        answer = self.client.get(f"/admin/adapters/{name}")
        return answer.json() if answer.status_code == 200 else None

    def pauses(self, begun: float, ended: float) -> tuple[float, float]:
        """(the longest pause, the longest that the loop itself computed), seconds."""
        path = self.state / "pauses"
        late = [(0.0, 0.0)]
        for line in path.read_text().splitlines() if path.exists() else []:
            at, wall, busy = map(float, line.split())
            if begun <= at <= ended:
                late.append((wall, busy))
        return max(wall for wall, _ in late), max(busy for _, busy in late)


def until(true: Callable[[], bool], pause_s: float = 0.01) -> None:
    """Waits until it is."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < PATIENCE_S, "it takes too long"
        time.sleep(pause_s)


class Bench:
    """Two servers and what is measured of them.

    Args:
        servers: they are.
        root: folder that adapters may come from.
        shape: of the layer that they change.
        web: a source elsewhere.
    """

    def __init__(self, servers: list[Served], root: Path, shape: tuple[int, int], web: Web) -> None:
        self.servers, self.root, self.shape, self.web = servers, root, shape, web
        self.rows: list[tuple[str, float, float, float]] = []
        self._made = 0

    def measure(self, what: str, work: Callable[[], int]) -> None:
        """Adds a row: seconds for one of what the work has done, and the pauses meanwhile."""
        begun = time.time()
        count = work()
        ended = time.time()
        time.sleep(0.2)
        self._add(what, (ended - begun) / count, [(begun, ended)] * len(self.servers))

    def _add(self, what: str, seconds: float, times: list[tuple[float, float]]) -> None:
        pauses = [s.pauses(*each) for s, each in zip(self.servers, times, strict=True)]
        wall, busy = (max(each) for each in zip(*pauses, strict=True))
        self.rows.append((what, seconds, wall, busy))
        print(f"{what}: {seconds:.3f} s, longest pause {1e3 * wall:.0f} ms "
              f"({1e3 * busy:.0f} ms of it computing)", flush=True)  # fmt: skip

    def start(self) -> None:
        """Starts both; a row for the adapters' part, and one for the whole."""
        begun = time.time()
        for server in self.servers:
            server.start()
        until(lambda: all(server.ready() for server in self.servers), 0.1)
        parts = [server.opened() for server in self.servers]
        self._add("start: the adapters", max(end - begin for begin, end in parts), parts)
        whole = [(begun, time.time()) for _ in self.servers]
        self._add("start: all, with the engine", time.time() - begun, whole)

    def ask(self, path: str) -> int:
        """Asks for a list five times."""
        for _ in range(5):
            self.servers[0].client.get(path).raise_for_status()
        return 5

    def load(self, names: list[str]) -> int:
        """Loads adapters, new ones or in the place of others, until both servers have them."""
        for name in names:
            self._made += 1
            value = -1e-3 * self._made
            source = make_adapter(self.root / f"new-{self._made}", self.shape, value)
            body = {"name": name, "source": str(source), "version": "2", "replace": True}
            self.servers[0].client.post("/admin/adapters", json=body).raise_for_status()
            until(lambda n=name: all(self._has(s, n) for s in self.servers))  # type: ignore[misc]
        return len(names)

    def _has(self, server: Served, name: str) -> bool:
        record = server.shown(name)
        assert record is None or record["state"] != "failed", record
        return record is not None and record["here"]["version"] == "2"

    def unload(self, names: list[str]) -> int:
        """Unloads adapters until neither server has them."""
        for name in names:
            self.servers[0].client.delete(f"/admin/adapters/{name}").raise_for_status()
            until(lambda n=name: all(s.shown(n) is None for s in self.servers))  # type: ignore[misc]
        return len(names)

    def download(self) -> int:
        """Loads an adapter that takes eight seconds to come, and says how far it is each second."""
        path = make_adapter(self.root / "slow", self.shape, 7.0)
        answers = folder(path, "/slow")
        raw = (path / "adapter_model.safetensors").read_bytes()
        free = threading.Event()

        def slowly(request: Any) -> None:
            request.send_response(200)
            request.send_header("content-length", str(len(raw)))
            request.end_headers()
            for i in range(16):
                request.wfile.write(raw[i * len(raw) // 16 : (i + 1) * len(raw) // 16])
                request.wfile.flush()
                free.wait(0.5)

        answers["/slow/adapter_model.safetensors"] = slowly
        self.web.answers |= answers
        body = {"name": "slow", "source": f"{self.web.url}/slow", "version": "2"}
        self.servers[0].client.post("/admin/adapters", json=body).raise_for_status()
        until(lambda: all(self._has(s, "slow") for s in self.servers), 0.1)
        return 1


def run(count: int, place: Path) -> list[tuple[str, float, float, float]]:
    """The rows of the table."""
    make_model(place / "base", "llama", seed=1)
    text = json.loads((place / "base" / "config.json").read_text())
    size = text["hidden_size"]
    heads = text["num_attention_heads"] * text.get("head_dim", size // text["num_attention_heads"])
    shape = (heads, size)
    redis = RedisServer(place / "redis")
    redis.start()
    root = place / "in"
    root.mkdir()
    with ExitStack() as ends:
        ends.callback(redis.stop)
        web = ends.enter_context(Web({}).running())
        begun = time.monotonic()
        asyncio.run(register(redis.url, ContentStore(place / "store"), count, shape))
        print(f"{count} adapters registered in {time.monotonic() - begun:.0f} s", flush=True)
        config = {
            "model": str(place / "base"), "server": {"port": 0},
            "engine": {"max_model_len": 256, "dtype": "float32", "enforce_eager": True,
                       "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8},
            "adapters": {"roots": [str(root)], "remotes": [web.url],
                         "max_loaded": 4, "max_rank": 16, "store": str(place / "store")},
            "registry": {"url": redis.url},
        }  # fmt: skip
        servers = [Served(place / name, config) for name in ("one", "two")]
        for server in servers:
            ends.callback(server.stop)
        bench = Bench(servers, root, shape, web)
        new = [f"new-{i}" for i in range(SOME)]
        old = [f"adapter-{i:05d}" for i in range(0, count, max(1, count // SOME))][:SOME]
        bench.start()
        for i, server in enumerate(servers):
            engine = server.client.get("/admin/adapters").json()["engine"]
            print(f"server {i + 1}: {engine['loads']} loads into the engine", flush=True)
        bench.measure("`GET /admin/adapters`", lambda: bench.ask("/admin/adapters"))
        bench.measure("`GET /v1/models`", lambda: bench.ask("/v1/models"))
        bench.measure("`GET /metrics`", lambda: bench.ask("/metrics"))
        bench.measure("a new adapter, on both", lambda: bench.load(new))
        bench.measure("a replacement, on both", lambda: bench.load(old))
        bench.measure("an unload, on both", lambda: bench.unload(new + old))
        bench.measure("a download of eight seconds", bench.download)
    return bench.rows


def main() -> int:
    """The command's exit status: 1 if a server's loop computed for 50 ms or more at a time, other
    than before it was ready.
    """
    parser = argparse.ArgumentParser(prog="python -m load_tests.registry_bench",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("--adapters", type=int, default=10_000)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory() as place:
        rows = run(given.adapters, Path(place))
    print(f"\n| {given.adapters:,} adapters, two servers | seconds | longest pause, ms | of it "
          "computing, ms |")  # fmt: skip
    print("|---|---|---|---|")
    for what, seconds, wall, busy in rows:
        print(f"| {what} | {seconds:.3f} | {1e3 * wall:.0f} | {1e3 * busy:.0f} |")
    return int(max(busy for what, _, _, busy in rows if "engine" not in what) >= 0.05)


if __name__ == "__main__":
    sys.exit(main())
