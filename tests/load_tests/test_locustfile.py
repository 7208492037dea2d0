"""The soak, for seconds, against a real server with the zoo."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.with_server import running_server

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with the zoo."""
    with running_server(ROOT / "zoo" / "server.yaml") as address:
        yield address


@pytest.mark.engine
@pytest.mark.slow
def test_the_soak_runs_and_nothing_fails(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--host", url]
    command += ["--headless", "-u", "8", "-r", "8", "-t", f"{SECONDS}s", "--stop-timeout", "60"]
    command += ["--csv", str(tmp_path / "soak")]
    environ = os.environ | {"SOAK_SAMPLE_S": "5", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "the server is idle" in done.stdout
    with (tmp_path / "soak_stats.csv").open() as file:
        counts = {row["Name"]: int(row["Request Count"]) for row in csv.DictReader(file)}
    kinds = {"steered", "steered stream", "adapted stream", "base", "left stream"}
    kinds |= {"refused with 400", "the same question"}
    assert {name for name, count in counts.items() if count} >= kinds


@pytest.mark.engine
@pytest.mark.slow
def test_the_soak_fails_without_a_server() -> None:
    command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py"]
    command += ["--host", "http://127.0.0.1:9", "--headless", "-u", "1", "-t", "2s"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
