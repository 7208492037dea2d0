"""Runs the checks of one client, one after the other, each with a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType
from typing import Any

from load_tests.clients.outcomes import Outcome

LIMIT_S = 60
"""How long one check may take."""

Check = Callable[[], Any]


class Checks:
    """Named functions that raise where something is not as it should be; coroutines too.

    Args:
        client: what the table calls it.
        distribution: whose version the table gives.
        limit_s: how long one check may take.
    """

    def __init__(self, client: str, distribution: str, limit_s: int = LIMIT_S) -> None:
        self._client, self._version = client, version(distribution)
        self._limit_s = limit_s
        self._checks: dict[str, Check] = {}

    def __call__(self, what: str) -> Callable[[Check], Check]:
        """Adds the decorated function under the name `what`."""

        def add(check: Check) -> Check:
            if what in self._checks:
                raise ValueError(f"two checks are called {what!r}")
            self._checks[what] = check
            return check

        return add

    def run(self) -> int:
        """Runs them; one line of JSON each on standard output.

        Returns:
            0: all have run, whatever they found.
        """
        # Clients print as they like; the lines of outcomes have standard output to themselves.
        with contextlib.redirect_stdout(sys.stderr):
            for what, check in self._checks.items():
                begin = time.monotonic()
                reason = self._reason(check)
                took = time.monotonic() - begin
                found = Outcome(self._client, self._version, what, reason, took)
                print(found.line(), file=sys.__stdout__, flush=True)
        return 0

    def _reason(self, check: Check) -> str:
        """Why it failed, or ''."""

        def late(number: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"no end after {self._limit_s} s")

        signal.signal(signal.SIGALRM, late)
        signal.alarm(self._limit_s)
        try:
            result = check()
            if inspect.iscoroutine(result):
                asyncio.run(result)
        except Exception as error:
            traceback.print_exc()
            return _said(error)
        finally:
            signal.alarm(0)
        return ""


@dataclass
class Raised:
    """What `refused` caught."""

    error: Any = None


@contextlib.contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[Raised]:
    """The block must raise this class of exception, with all of these words in its text."""
    found = Raised()
    try:
        yield found
    except kind as error:
        found.error = error
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"{kind.__name__} does not say {missing}: {error}") from error
        return
    raise AssertionError(f"nothing was raised, expected {kind.__name__}")


def _said(error: Exception) -> str:
    """The error, and for a bare assertion the line that failed."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, AssertionError):
        here = [one for one in traceback.extract_tb(error.__traceback__) if "with_" in one.filename]
        if here:
            text = f"{here[-1].line} ({error})" if str(error) else str(here[-1].line)
    return text
