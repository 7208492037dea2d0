"""A local HTTP server that answers as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@contextmanager
def endpoint(first: list[Answer], last: Answer) -> Iterator[tuple[str, list[float]]]:
    """Answers POST by each of `first`, then by `last`; its address, and when it was asked."""
    when: list[float] = []
    answers = list(first)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            when.append(time.monotonic())
            (answers.pop(0) if answers else last)(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Who asked has hung up: that is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", when
    finally:
        server.shutdown()
        server.server_close()


def status(number: int, content: Any, **headers: str) -> Answer:
    """An answer of JSON."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(number)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(json.dumps(content).encode())

    return answer


def hang_up(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """No answer at all."""
    handler.close_connection = True
