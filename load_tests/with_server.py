"""Runs a command beside a server: `python -m load_tests.with_server CONFIG -- COMMAND`.

A server that is already ready at the address is used and left running; otherwise one is started
and stopped again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

START_TIMEOUT_S = 480.0
"""The first start on a new machine reads everything from a cold disk and compiles bytecode."""
STOP_TIMEOUT_S = 60.0
LOG_TAIL_CHARACTERS = 4000


class NotReadyError(Exception):
    """The server ended, or was not ready in time; holds the end of its log."""


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_ready(url: str, path: str = "/ready") -> bool:
    """Whether a server at `url` answers `path` with 200."""
    try:
        with urllib.request.urlopen(f"{url}{path}", timeout=5) as response:
            ready: bool = response.status == 200
    except (urllib.error.URLError, OSError):
        return False
    return ready


@contextlib.contextmanager
def running_server(
    config: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    arguments: Sequence[str] = (),
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """Starts `coxswain serve`, yields its URL once it is ready, and stops it.

    Args:
        config: the configuration file.
        host: the address that it binds to.
        port: absent: a free one.
        arguments: further command-line arguments.
        timeout_s: how long the start may take.

    Raises:
        NotReadyError: the server ended, or was not ready in time.
    """
    port = free_port() if port is None else port
    url = f"http://{host}:{port}"
    # The command of this environment, which need not be on the PATH.
    program = str(Path(sys.executable).with_name("coxswain"))
    command = [program, "serve", str(config), "--host", host, "--port", str(port), *arguments]
    # A registry of its own: the usual one may be in use by a server that runs already.
    with tempfile.TemporaryDirectory() as state:
        environ = {"XDG_STATE_HOME": state}
        with running_command(command, url, environ, ready="/ready", timeout_s=timeout_s) as found:
            yield found


@contextlib.contextmanager
def running_command(
    command: Sequence[str],
    url: str,
    environ: Mapping[str, str],
    *,
    ready: str = "/health",
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """Starts a server, yields its URL once it is ready, and stops it.

    Args:
        command: what starts it.
        url: where it will answer.
        environ: variables beside those of this process.
        ready: the path that it answers with 200 when it is ready.
        timeout_s: how long the start may take.

    Raises:
        NotReadyError: the server ended, or was not ready in time.
    """
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environ},
        )
        try:
            _wait(server, url + ready, timeout_s, log)
            yield url
        finally:
            _stop(server)


def _wait(server: subprocess.Popen[bytes], url: str, timeout_s: float, log: IO[str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_ready(url, ""):
        code = server.poll()
        if code is None and time.monotonic() < deadline:
            time.sleep(0.25)
            continue
        log.seek(0)
        tail = log.read()[-LOG_TAIL_CHARACTERS:]
        reason = f"was not ready after {timeout_s:g} s" if code is None else f"ended with {code}"
        raise NotReadyError(f"the server {reason}; its log ends:\n{tail}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM drains; a server that hangs is killed."""
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.with_server", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    if is_ready(f"http://{args.host}:{args.port}"):
        return subprocess.call(args.command)
    try:
        with running_server(args.config, host=args.host, port=args.port):
            return subprocess.call(args.command)
    except NotReadyError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
