"""A stream that is read in the background, and the last line of a log."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Protocol

import httpx

from tests.server.live import Server

BODY: dict[str, Any] = {
    "model": "big-chat", "prompt": "Water boils", "max_tokens": 200, "ignore_eos": True,
    "stream": True,
}  # fmt: skip


class Address(Protocol):
    """A server, or what stands before it."""

    @property
    def url(self) -> str:
        """Where it answers."""


class Stream(threading.Thread):
    """Reads one stream in the background."""

    def __init__(
        self,
        server: Address,
        body: dict[str, Any] = BODY,
        path: str = "/v1/completions",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.headers = headers
        self.url = server.url + path
        self.body = body
        self.lines: list[str] = []
        self.begun = threading.Event()

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # the server may end before the stream
            httpx.stream(
                "POST", self.url, json=self.body, headers=self.headers, timeout=120
            ) as answer,
        ):
            for line in answer.iter_lines():
                self.lines.append(line)
                self.begun.set()


def last_line(server: Server) -> str:
    return server.log.read_text().strip().splitlines()[-1]
