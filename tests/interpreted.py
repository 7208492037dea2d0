"""Runs tests in Triton's interpreter, in a process of their own.

Triton decides when it is imported whether its kernels are compiled or interpreted, for the whole
process; and other packages import it. So tests of kernels lie in folders that are left out of an
ordinary run, and an ordinary test runs them by this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def interpret(*arguments: str, first: str = "") -> str:
    """Runs tests; fails with their output.

    Args:
        arguments: for pytest; paths from the repository's root.
        first: a folder, from the root, whose `sitecustomize` Python runs first in the process and
            in those that it starts.

    Returns:
        What pytest printed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "-p", "tests.fast_interpreter"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if first:
        before = [str(ROOT / first), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, before))
    run = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    # 5 is "no tests ran", which would be no success either.
    assert run.returncode == 0, f"pytest gave {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout
