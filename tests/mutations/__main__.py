"""Applies each fault to a copy of the repository and runs its tests there.

`python -m tests.mutations` tries all of them, `--only 3 7` some, `--fast` those whose tests start
no engine. The exit status is 1 if a fault goes unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.fault import Fault
from tests.mutations.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
LEFT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "site", "build"
)
RED = 1
"""pytest's status when tests failed; others say that they could not run."""
PATIENCE_S = 900


def tried(fault: Fault, copy: Path, fast: bool) -> tuple[int, str]:
    """Pytest's exit status with the fault in place, and the end of what it printed."""
    file = copy / fault.file
    text = file.read_text("utf-8")
    assert text.count(fault.old) == 1, f"{fault.file}: {fault.old!r} is not there once"
    file.write_text(text.replace(fault.old, fault.new), "utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not engine and not slow"] if fast else []
    environ = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *fault.tests.split()], cwd=copy, env=environ, timeout=PATIENCE_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        file.write_text(text, "utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (failed or done.stdout.splitlines() or [done.stderr])[-1]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers from the list")
    parser.add_argument("--fast", action="store_true", help="no engines")
    asked = parser.parse_args()
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT, symlinks=True)
        for number in asked.only or range(len(FAULTS)):
            fault, began = FAULTS[number], time.monotonic()
            status, said = tried(fault, copy, asked.fast)
            word = "red" if status == RED else f"NOT NOTICED (status {status})"
            took = time.monotonic() - began
            print(
                f"{number:2} {word}, {took:.0f} s: {fault.file}: {fault.why}\n   {said}", flush=True
            )
            if status != RED:
                unnoticed.append(number)
    print(f"unnoticed: {unnoticed or 'none'}")
    return int(bool(unnoticed))


if __name__ == "__main__":
    sys.exit(main())
