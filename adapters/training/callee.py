"""The process in which a function of the user's file is called: `callee.py FILE FUNCTION`.

Reads a JSON list of arguments per line, and writes a JSON object per line: first `{}` when the
file is loaded, then `{"value": …}` for each call. Where something is raised it is `{"error": …}`.
Standard output is the function's own to print to; it goes to standard error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1


def _load(file: Path, name: str) -> Callable[..., Any]:
    sys.path.insert(0, str(file.parent.resolve()))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise LookupError(f"{file.name} has no function {name}")
    return found


def _told(error: BaseException) -> dict[str, str]:
    """The last line of the traceback, and where in the user's code it was."""
    last = traceback.format_exception_only(error)[-1].strip()
    ours = Path(__file__).name
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name != ours]
    at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return {"error": f"{last}{at}"}


def main(file: str, name: str) -> None:
    """Answers until the caller hangs up."""
    # A caller that is killed must not leave a process behind that hangs in the user's code.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found, default=float) + "\n")  # default: numbers of numpy, torch
        answers.flush()

    try:
        function = _load(Path(file), name)
        answer({})
        for line in asked:
            answer({"value": function(*json.loads(line))})
    except BaseException as error:  # What a user's code raises, it raises; also sys.exit.
        answer(_told(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
