"""A real server whose engine fails to load adapters when it is told to.

    python -m tests.faulty PYTHON -m server.main serve FILE …

Runs the command line behind it in this process, with another worker extension and a shorter
time-out of remote calls. `COXSWAIN_TEST_FAULTS` names a file; what it says goes wrong with the
loads that begin while it is there:

    {"point": "fill", "after": 3, "error": "memory"}     an error at a point of `tests.injected`
    {"slow_s": 2.5}                                      the load comes late, but it comes
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

FILE, TIMEOUT = "COXSWAIN_TEST_FAULTS", "COXSWAIN_TEST_RPC_TIMEOUT_S"

ERRORS = ("memory", "files", "bug", "adapter")
"""What can be raised: see `error_of`."""


def error_of(name: str) -> Exception:
    """The error that a file asks for."""
    import torch

    from adapters.errors import BadAdapter
    from tests.injected import Injected

    return {
        "memory": torch.OutOfMemoryError("out of memory"),
        "files": OSError(errno.EIO, "input/output error"),
        "bug": Injected("a bug"),
        "adapter": BadAdapter("broken"),
    }[name]


def wish() -> dict[str, Any]:
    """What shall go wrong now; {}: nothing."""
    try:
        found: dict[str, Any] = json.loads(Path(os.environ[FILE]).read_bytes())
    except FileNotFoundError:
        return {}
    return found


def note_broken(text: str) -> None:
    """The worker found something that must not be."""
    with Path(os.environ[FILE]).with_suffix(".broken").open("a") as file:
        file.write(text + "\n")


def broken(file: Path) -> str:
    """What the worker found, if anything."""
    found = file.with_suffix(".broken")
    return found.read_text() if found.exists() else ""


def main() -> None:
    """Ends the process with the server's status."""
    from server import engine_vllm
    from server.main import run
    from steering import engine_args

    engine_args.WORKER_EXTENSION = "tests.faulty_worker.FaultyExtension"
    engine_vllm.RPC_TIMEOUT_S = float(os.environ.get(TIMEOUT, "30"))
    status = run(sys.argv[sys.argv.index("server.main") + 1 :])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as `server.main`


def give_wish(file: Path, wished: dict[str, Any]) -> None:
    """Writes a file at once."""
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(wished))
    beside.replace(file)


if __name__ == "__main__":
    main()
