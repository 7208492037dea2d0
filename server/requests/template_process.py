"""The processes in which templates of requests are rendered: see `server.requests.sandbox`.

One has imported everything and renders nothing. It forks another that renders, one template after
the other, until one takes too long or too much memory and ends it; the next is there in
milliseconds. Needs nothing of the server.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RENDER_S = 2.0
"""Seconds that one template may run."""

LONGEST_RENDERED = 16 * 1024 * 1024
"""Characters that a rendered prompt may have before it is tokenised."""

ROOM_BYTES = 512 * 1024 * 1024
"""Memory that templates may take beside what the process has when it starts."""


def packed(value: Any) -> bytes:
    """Packs a message for the pipe."""
    return json.dumps(value).encode()


def unpacked(raw: bytes) -> Any:
    """Unpacks a message from the pipe."""
    return json.loads(raw)


def serve(pipe: Connection) -> None:
    """Passes one request after the other on, until the server hangs up.

    Args:
        pipe: gives `[template, messages, variables]`, takes `{"text"}` or `{"error"}`, as JSON.
    """
    # The forked processes find it imported; the server's own process has no use for it.
    import transformers.utils.chat_template_utils  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's business
    pipe.send_bytes(b"ready")
    renderer: _Renderer | None = None
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        renderer = renderer or _Renderer(pipe)
        try:
            renderer.pipe.send_bytes(request)
            answer = renderer.pipe.recv_bytes()
        except (EOFError, OSError):
            answer = packed({"error": renderer.end()})
            renderer = None
        pipe.send_bytes(answer)


class _Renderer:
    """The forked process, as the other one sees it.

    Args:
        server: the pipe to the server, which is not for it.
    """

    def __init__(self, server: Connection) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                server.close()
                self.pipe.close()
                _render_all(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def end(self) -> str:
        """Why it has ended."""
        self.pipe.close()
        _, status = os.waitpid(self._pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            return f"it ran for more than {RENDER_S:g} s"
        return "it needs too much memory"


def _render_all(pipe: Connection) -> None:
    """Renders one after the other, until there is no memory or nobody asks any more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            # The alarm ends the process, wherever it is, also if nobody is left to look after it.
            signal.setitimer(signal.ITIMER_REAL, RENDER_S)
            answer = _rendered(request)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except MemoryError:
            return
        pipe.send_bytes(packed(answer))


def _rendered(request: bytes) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    template, messages, variables = unpacked(request)
    try:
        texts, _ = render_jinja_template([messages], chat_template=template, **variables)
        if len(texts[0]) > LONGEST_RENDERED:
            return {"error": f"its text has {len(texts[0])} characters, more than "
                    f"{LONGEST_RENDERED}"}  # fmt: skip
        return {"text": texts[0]}
    except MemoryError:
        raise
    except Exception as error:
        # Jinja runs the caller's template: it may raise anything, and all of it is their fault.
        detail = " ".join(str(error).split())[:300]
        return {"error": f"{type(error).__name__}: {detail}"}
