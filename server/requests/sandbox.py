"""Renders chat templates of requests in a process of its own.

A template is a program. Jinja's sandbox keeps it away from the server's objects, but not from
running for days or from asking for all memory. Here it may try: only this process ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

RENDER_S = 2.0
"""Seconds that one template may run."""

ROOM_BYTES = 512 * 1024 * 1024
"""Memory that templates may take beside what the process has when it starts."""

START_S = 60.0
"""Seconds that the process may take to start."""


class RenderFailed(Exception):
    """A template that does not render: one sentence says why."""


class Sandbox:
    """One process, started when it is first needed and again after a template ended it."""

    def __init__(self) -> None:
        self.line = ThreadPoolExecutor(1, "templates")
        """Where `render` is to be called: one template after the other, and slow ones hold up
        nothing else."""
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """The text of `messages`, rendered as a tokenizer would. Blocks: call it on `line`.

        Args:
            template: Jinja.
            messages: role, content and the like; JSON-able.
            variables: what the template sees beside the messages; JSON-able.

        Raises:
            RenderFailed: the template is wrong, or takes too long or too much memory.
        """
        request = json.dumps([template, list(messages), dict(variables)]).encode()
        pipe = self._started()
        try:
            pipe.send_bytes(request)
            if not pipe.poll(RENDER_S):
                self._end()
                raise RenderFailed(f"it ran for more than {RENDER_S:g} s")
            answer = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._end()
            raise RenderFailed("it needs too much memory") from error
        if "error" in answer:
            raise RenderFailed(answer["error"])
        return str(answer["text"])

    def _started(self) -> Connection:
        if self._pipe is not None and self._process is not None and self._process.is_alive():
            return self._pipe
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs,), name="templates", daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S):
            self._end()
            raise RenderFailed("the process that renders templates does not start")
        self._pipe.recv_bytes()
        return self._pipe

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _serve(pipe: Connection) -> None:
    """The process: one JSON request after the other, until the server hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's business
    from transformers.utils.chat_template_utils import render_jinja_template

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send_bytes(b"ready")
    while True:
        try:
            template, messages, variables = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            texts, _ = render_jinja_template([messages], chat_template=template, **variables)
            answer = {"text": texts[0]}
        except MemoryError:
            return
        except Exception as error:
            # Jinja runs the caller's template: it may raise anything, and all of it is their fault.
            detail = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {detail}"}
        pipe.send_bytes(json.dumps(answer).encode())
