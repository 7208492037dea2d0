"""An engine does not outlive its server."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from steering.worker.entry import end_with_parent


def test_a_process_whose_parent_is_killed_ends() -> None:
    root = str(Path(__file__).parents[3])
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.steering.worker.test_entry"],
        stdout=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    assert server.stdout is not None
    engine = psutil.Process(int(server.stdout.readline()))
    assert engine.is_running()
    server.kill()
    server.wait()
    server.stdout.close()
    engine.wait(30)


def _engine() -> None:
    end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)


if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=_engine).start()
    time.sleep(60)
