"""Renders chat templates of requests in processes of their own, a few at a time, in turns.

A template is a program. Jinja's sandbox keeps it away from the server's objects, but not from
running for days or from asking for all memory. Here it may try: only its process ends, and it
keeps nobody waiting but its own caller: each has a queue, all but one of the processes at most, and
its turn after the others'.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from server.access import ANYONE
from server.errors import HttpError
from server.requests import template_process
from server.requests.template_process import RENDER_S

START_S = 60.0
"""Seconds that a process may take to start."""

MOST_WAITING = 64
"""Templates of one caller that may wait."""


class RenderFailed(Exception):
    """A template that does not render: one sentence says why."""


@dataclass(eq=False)
class _Job:
    """One template that waits, or runs."""

    caller: str
    work: tuple[str, Sequence[Mapping[str, Any]], Mapping[str, Any]]
    done: asyncio.Future[str]


class Sandbox:
    """The processes, each started when it is first needed.

    Lives on the event loop.

    Args:
        workers: processes.
        most_waiting: templates of one caller that may wait.
    """

    def __init__(self, workers: int = 2, most_waiting: int = MOST_WAITING) -> None:
        self._workers, self._most_waiting = workers, most_waiting
        self._threads = ThreadPoolExecutor(workers, "templates")
        self._free = [_Worker() for _ in range(workers)]
        self._waiting: dict[str, deque[_Job]] = {}
        """By caller; the first is the next one's turn."""
        self._running = Counter[str]()
        self._tasks: set[asyncio.Task[None]] = set()

    async def render(
        self,
        caller: str,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> str:
        """The text of `messages`, rendered as a tokenizer would.

        Args:
            caller: whose queue it joins (`Access.caller`).
            template: Jinja.
            messages: role, content and the like; JSON-able.
            variables: what the template sees beside the messages; JSON-able.

        Raises:
            RenderFailed: the template is wrong, or takes too long or too much memory.
            HttpError: 429, too many of this caller's wait.
        """
        queue = self._waiting.setdefault(caller, deque())
        if len(queue) >= self._most_waiting:
            raise HttpError(429, f"{len(queue)} chat templates of this API key wait to be rendered "
                            "already; that is the most.", retry_after_s=int(RENDER_S),
                            reason="queue_full")  # fmt: skip
        work = (template, messages, variables)
        job = _Job(caller, work, asyncio.get_running_loop().create_future())
        queue.append(job)
        self._start()
        try:
            return await job.done
        finally:
            self._forget(job)

    def _start(self) -> None:
        """Gives free processes to the callers whose turn it is."""
        for caller in list(self._waiting):
            if not self._free:
                return
            if self._running[caller] >= self._most_of(caller):
                continue
            job = self._waiting[caller].popleft()
            queue = self._waiting.pop(caller)
            if queue:
                self._waiting[caller] = queue  # behind all others
            self._running[caller] += 1
            task = asyncio.create_task(self._run(self._free.pop(), job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _most_of(self, caller: str) -> int:
        """How many processes one caller may take: one stays free for others, if there are any."""
        return self._workers if caller == ANYONE else max(1, self._workers - 1)

    async def _run(self, worker: _Worker, job: _Job) -> None:
        """Renders one; a caller who has left meanwhile keeps the process until it is done."""
        loop = asyncio.get_running_loop()
        try:
            text = await loop.run_in_executor(self._threads, worker.render, *job.work)
        except Exception as error:
            if not job.done.done():
                job.done.set_exception(error)
        else:
            if not job.done.done():
                job.done.set_result(text)
        finally:
            self._free.append(worker)  # the last one is taken first: its process is there
            self._running[job.caller] -= 1
            if not self._running[job.caller]:
                del self._running[job.caller]
            self._start()

    def _forget(self, job: _Job) -> None:
        """Takes a job whose caller has left out of its queue."""
        queue = self._waiting.get(job.caller)
        if queue is not None and job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.caller]


class _Worker:
    """One process. Its methods block; one thread at a time calls them."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """As `Sandbox.render`.

        Raises:
            RenderFailed: as there.
        """
        request = template_process.packed([template, list(messages), dict(variables)])
        pipe = self._started()
        try:
            pipe.send_bytes(request)
            if not pipe.poll(START_S):
                raise EOFError
            answer = template_process.unpacked(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._end()
            raise RenderFailed("the process that renders templates has ended") from error
        if "error" in answer:
            raise RenderFailed(answer["error"])
        return str(answer["text"])

    def _started(self) -> Connection:
        if self._pipe is not None and self._process is not None and self._process.is_alive():
            return self._pipe
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=template_process.serve, args=(theirs,), name="templates", daemon=True
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
