"""Calls a function of the user's own file, in another process: it may raise, hang or crash."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from adapters.training.errors import BadRecipe

_LOAD_S = 300.0
"""A file may import torch and load a model."""


class Called:
    """A function, with the process in which it is called; a context manager that ends it.

    Args:
        text: `FILE.py:FUNCTION`.
        flag: of the command line, where the text comes from.
        timeout_flag: of the command line, where `timeout_s` comes from.
        timeout_s: seconds that one call may take; > 0.

    Raises:
        BadRecipe: there is no such file or function, or loading it fails.
    """

    def __init__(self, text: str, flag: str, timeout_flag: str, timeout_s: float) -> None:
        file, _, name = text.rpartition(":")
        if not Path(file).is_file():
            raise BadRecipe("no such file", field=flag, value=file, allowed="FILE.py:FUNCTION")
        self._text, self._remedy = text, f"a longer {timeout_flag}"
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adapters.training.callee", file, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Its own children are killed with it.
        )
        self._buffer = b""
        try:
            self._receive(flag, _LOAD_S)
        except BaseException:
            self.close()
            raise

    def call(self, where: str, *arguments: Any) -> Any:
        """What the function returns, a JSON value (numbers of numpy and torch become floats).

        Args:
            where: what it is called for, for errors.
            arguments: JSON values.

        Raises:
            BadRecipe: it raises, takes too long or crashes. The process has ended then.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has crashed, and the answer that does not come will say so.
        try:
            return self._receive(where, self._timeout_s)["value"]
        except BaseException:
            self.close()
            raise

    def _receive(self, where: str, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line(where, timeout_s))
        if "error" in answer:
            raise BadRecipe(f"{self._text} raises {answer['error']}", field=where)
        return answer

    def _line(self, where: str, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = max(0.0, until - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                raise BadRecipe(
                    f"{self._text} gives no answer within {timeout_s:g} s",
                    field=where,
                    allowed=self._remedy,
                )
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                status = self._process.wait()
                raise BadRecipe(f"{self._text} ended its process, status {status}", field=where)
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        """Kills the process, whatever it is doing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Called:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
