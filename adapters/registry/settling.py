"""Which adapters have something to do, and the task that does it: one for each at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Protocol

from adapters.registry.decide import Step
from adapters.registry.failure import log_unexpected

_BATCH = 100
"""Adapters that are looked at before the event loop gets its turn."""

_CHECKS = 256
"""Adapters whose tasks wait for a check: thousands would make Python's collector pause."""


class Adapted(Protocol):
    """The state of the adapters."""

    def next_step(self, name: str) -> Step:
        """The next step for one adapter."""
        ...

    def rests(self, name: str) -> bool:
        """Whether one with nothing to do has none until its record changes."""
        ...

    def away(self) -> bool:
        """Whether the registry cannot be reached: then nothing is begun."""
        ...


class Settling:
    """One per replica, on its event loop.

    Args:
        known: what is to be done.
        steps: does it, for one adapter, until nothing is left to do or the registry is away.
    """

    def __init__(self, known: Adapted, steps: Callable[[str], Coroutine[None, None, None]]) -> None:
        self._known, self._steps = known, steps
        self._waiting: dict[str, None] = {}  # names that may have something to do, in order
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._checks: set[str] = set()
        self._wake = asyncio.Event()

    @property
    def unsettled(self) -> list[str]:
        """Adapters that may not be as their records say; all others are."""
        return [*self._waiting, *(self._tasks.keys() - self._waiting.keys())]

    def look_at(self, names: Iterable[str]) -> None:
        """These may have something to do, the first ones first."""
        self._waiting |= dict.fromkeys(names)
        self._wake.set()

    async def run(self) -> None:
        """Starts a task for every adapter that has something to do and none under way; for ever.

        What changed is looked at at once, what is under way again every second: failures that may
        pass, and owners that died, are noticed without any write.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()
            self._wake.clear()
            for i, name in enumerate(list(self._waiting)):
                if self._known.away():
                    break
                if name not in self._tasks:
                    self._begin(name)
                if i % _BATCH == _BATCH - 1:
                    await asyncio.sleep(0)

    async def end(self) -> None:
        """Cancels what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, name: str) -> None:
        step = self._known.next_step(name)
        if step == "nothing":
            if self._known.rests(name):
                self._waiting.pop(name, None)
            return
        if step == "follow":
            if len(self._checks) >= _CHECKS:
                return
            self._checks.add(name)
        task = asyncio.create_task(self._steps(name), name=f"adapter {name}")
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._done(name, done))

    def checked(self, name: str) -> None:
        """An adapter no longer waits for a check."""
        self._checks.discard(name)
        if len(self._checks) == _CHECKS // 2:
            self._wake.set()

    def _done(self, name: str, task: asyncio.Task[None]) -> None:
        del self._tasks[name]
        self._waiting[name] = None
        self.checked(name)
        log_unexpected(name, task)
