"""Coxswain behind Ray Serve: each replica runs one server and passes its HTTP on, untouched.

`PYTHONPATH=examples/ray_serve serve run examples/ray_serve/serve.yaml`. Serve starts, spreads,
checks and restarts the replicas and shares the requests out; the server does the rest as everywhere
else. It is a process of its own, because vLLM's engine wants the main thread and the signals.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from server.settings.config import Config
from server.settings.file import load

logger = logging.getLogger("ray.serve")

_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host"}
"""Headers that belong to one connection, not to the request or the answer."""


class Settings(BaseModel, extra="forbid"):
    """`args` of the application.

    Args:
        config: the server's configuration file; the same on every machine.
        flags: more arguments of `coxswain serve`.
        start_timeout_s: how long loading may take, in seconds.
    """

    config: str
    flags: list[str] = Field(default_factory=list)
    start_timeout_s: float = Field(1800.0, gt=0)


class ServerEnded(Exception):
    """The server of this replica is not there; Serve replaces the replica."""


@serve.deployment(name="Replica")
class Replica:
    """One `coxswain serve` process and the way to it.

    Args:
        settings: where its configuration is.

    Raises:
        ServerEnded: it did not start.
    """

    # Serve awaits it, and sends no request before.
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        self.drain_s = load(Path(settings.config)).server.drain_timeout_s
        port = _free_port()
        # setpriv: a replica that is killed takes its server along.
        command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "server.main", "serve"]
        command += [settings.config, *settings.flags, "--host", "127.0.0.1", "--port", str(port)]
        self.process = await asyncio.create_subprocess_exec(*command)
        self.watching: asyncio.Task[None] | None = None
        # No limits of our own: Serve and the server have theirs.
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip
        async with asyncio.timeout(settings.start_timeout_s):
            while not await self._ready():  # noqa: ASYNC110 - another process cannot set an event
                await asyncio.sleep(0.3)
        self.watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Ends with its server, at once: a failing replica is a fast one, and Serve would send it
        most requests until its looks at it have failed.
        """
        status = await self.process.wait()
        logger.error("the server of this replica has ended with status %s", status)
        os._exit(1)

    async def _ready(self) -> bool:
        if self.process.returncode is not None:
            raise ServerEnded(f"exit status {self.process.returncode}; its own message is above")
        try:
            return (await self.client.get("/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def check_health(self) -> None:
        """For Serve: raises where the replica must be replaced."""
        if self.process.returncode is not None:
            raise ServerEnded(f"exit status {self.process.returncode}")
        (await self.client.get("/health", timeout=10)).raise_for_status()

    async def __call__(self, request: Request) -> Response:
        """Passes one request on."""
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        sent = self.client.build_request(
            request.method, path, content=request.stream(),
            headers=[(k, v) for k, v in request.headers.items() if k not in _HOP],
        )  # fmt: skip
        try:
            answer = await self.client.send(sent, stream=True)
        except httpx.TransportError as error:
            logger.warning("%s %s: %r", request.method, path, error)
            problem = {"message": "The server of this replica does not answer.",
                       "type": "service_unavailable", "param": None, "code": "dead"}  # fmt: skip
            return JSONResponse({"error": problem}, 503, {"retry-after": "5"})
        found = StreamingResponse(_body(answer), answer.status_code)
        found.raw_headers = [
            (k, v) for k, v in answer.headers.raw if k.lower().decode() not in _HOP
        ]
        return found

    async def __del__(self) -> None:
        """Serve's orderly end, after the last request: the server drains and ends."""
        if self.watching is not None:
            self.watching.cancel()
        if self.process.returncode is None:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), self.drain_s + 25)
            except TimeoutError:
                self.process.kill()


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    """An answer's bytes as they come; a client that leaves ends the request in the server too."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _check(config: Config) -> None:
    """Refuses what would be unsafe or wrong with several replicas.

    Raises:
        ValueError: names the setting.
    """
    if config.auth.admin_key is None:
        # Each server is bound to loopback and would take Serve's callers for local ones.
        raise ValueError("auth.admin_key (COXSWAIN_ADMIN_KEY) is required behind Ray Serve")
    if config.adapters is not None and (config.registry is None or config.registry.url is None):
        raise ValueError("registry.url is required: replicas with adapters must share one Redis")


def build(args: dict[str, Any]) -> Application:
    """The application, for `import_path: coxswain_serve:build`.

    Args:
        args: fields of `Settings`.

    Raises:
        pydantic.ValidationError: `args` has a wrong field.
        ValueError: the configuration is not for several replicas.
    """
    settings = Settings.model_validate(args)
    _check(load(Path(settings.config)))
    return Replica.bind(settings)  # type: ignore[attr-defined]
