"""Real HTTP servers on loopback: a web server whose every path can misbehave, and a hub."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Answer = Callable[[BaseHTTPRequestHandler], None]

SHA = "0123456789abcdef0123456789abcdef01234567"
"""The commit that the hub serves."""


class Server:
    """Answers by path; counts what was asked.

    Args:
        answers: path → what to do with the request; others get 404.
    """

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                outer.asked.append(path)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer.answers.get(path, status(404))(self)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[Server]:
        """With its thread around it."""
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


def send(content: bytes, **headers: str) -> Answer:
    """200 with a body; `headers` with _ for -."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        given = {"content-length": str(len(content)),
                 **{name.replace("_", "-"): value for name, value in headers.items()}}  # fmt: skip
        for name, value in given.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    return answer


def status(code: int, **headers: str) -> Answer:
    """An empty answer with a status."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {"content-length": "0", **headers}.items():
            request.send_header(name, value)
        request.end_headers()

    return answer


def break_off(content: bytes, after: int) -> Answer:
    """Announces all of the content and closes the connection after some bytes."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[:after])
        request.wfile.flush()
        request.close_connection = True

    return answer


def endless(request: BaseHTTPRequestHandler) -> None:
    """Chunks without an end and without a length."""
    request.send_response(200)
    request.send_header("transfer-encoding", "chunked")
    request.end_headers()
    block = b"\x10" + bytes(7) + b"x" * (1 << 20)
    while True:
        request.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))


def in_turn(*answers: Answer) -> Answer:
    """The first request gets the first answer, and so on; the last one stays."""
    left = list(answers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


def held_back(answers: dict[str, Answer], path: str) -> threading.Event:
    """Has a path answer only after the event is set, or after a minute."""
    free, answer = threading.Event(), answers[path]

    def wait(request: BaseHTTPRequestHandler) -> None:
        free.wait(60)
        answer(request)

    answers[path] = wait
    return free


def folder(path: Path, prefix: str) -> dict[str, Answer]:
    """Answers that serve a folder's files under a path."""
    return {
        f"{prefix}/{file.relative_to(path)}": send(file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def hub(path: Path, repo: str) -> dict[str, Answer]:
    """What huggingface_hub asks of a hub with one repository: its files at one commit."""
    files = sorted(f for f in path.rglob("*") if f.is_file())
    info = {"id": repo, "sha": SHA, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": str(f.relative_to(path))} for f in files]}  # fmt: skip
    about = send(json.dumps(info).encode(), content_type="application/json")
    found = {f"/api/models/{repo}": about}
    found |= {f"/api/models/{repo}/revision/{revision}": about for revision in ("main", "v1", SHA)}
    for parent in {path, *(f.parent for f in files)}:
        listed = [
            {"type": "file", "oid": "0" * 40, "size": f.stat().st_size,
             "path": str(f.relative_to(path))} if f.is_file()
            else {"type": "directory", "oid": "0" * 40, "size": 0, "path": str(f.relative_to(path))}
            for f in sorted(parent.iterdir())
        ]  # fmt: skip
        tree = f"/api/models/{repo}/tree/{SHA}/{parent.relative_to(path)}".removesuffix("/.")
        found[tree] = send(json.dumps(listed).encode(), content_type="application/json")
    for f in files:
        name = str(f.relative_to(path))
        found[f"/{repo}/resolve/{SHA}/{name}"] = send(f.read_bytes(), x_repo_commit=SHA)
    return found
