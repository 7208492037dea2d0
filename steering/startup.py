"""What an engine does while it starts: the worker reports, the server listens. No torch.

They are two processes, and vLLM's channel between them opens when the engine has started. So the
worker appends lines to a file, whose path it finds in its environment.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FILE = "COXSWAIN_STARTUP_FILE"
"""The variable with the file's path; without it nobody listens."""

EVERY_S = 0.2
"""How often the server looks."""


@dataclass(frozen=True)
class Stage:
    """Something that an engine begins, or has done, with one of its models.

    Args:
        doing: `compiled` is the end of `compiling`; the others are beginnings.
        stream: whose model.
        number: of the model, from 1.
        count: of the models.
        seconds: of `compiled`, how long it took.
    """

    doing: Literal["loading", "compiling", "compiled"]
    stream: str
    number: int
    count: int
    seconds: float = 0.0


def report(stage: Stage) -> None:
    """Reports a stage to the server, if one listens."""
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(stage)) + "\n")


@contextmanager
def listening(on_stage: Callable[[Stage], None]) -> Iterator[None]:
    """Listens to the engines that are started inside.

    Args:
        on_stage: called in a thread of its own, for each stage in order.
    """
    with tempfile.TemporaryDirectory(prefix="coxswain-") as folder:
        path = Path(folder) / "startup.jsonl"
        path.touch()
        os.environ[FILE] = str(path)
        done = threading.Event()
        thread = threading.Thread(target=_listen, args=(path, on_stage, done), name="startup")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            del os.environ[FILE]


def _listen(path: Path, on_stage: Callable[[Stage], None], done: threading.Event) -> None:
    with path.open(encoding="utf-8") as file:
        rest, last = "", False
        while not last:
            last = done.wait(EVERY_S)  # what was written before the end is read after it
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                on_stage(Stage(**json.loads(line)))
