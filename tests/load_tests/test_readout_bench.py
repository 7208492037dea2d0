"""What of the read-out's benchmark needs no GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from load_tests.readout_bench import Case, cases, markdown
from steering.plan import RuleKind

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "load_tests.readout_bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_claims_nothing(tmp_path: Path) -> None:
    found = run("--out", str(tmp_path / "x"))
    assert found.returncode == 0
    assert found.stdout.strip() == "There is no NVIDIA GPU here: nothing was measured."
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)
def test_both_paths_agree_at_a_small_size() -> None:
    found = run("--interpret")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("agree with the torch path") == len(RuleKind)


def test_the_least_bytes() -> None:
    assert Case(10, 3, 4).least_bytes(2) == 3 * 10 * (4 * 2 + 4)
    assert Case(10, 3, 3, RuleKind.NUCLEUS).least_bytes(2) == 3 * 10 * (3 * 2 + 4)
    assert Case(10, 3, 3, RuleKind.PLAUSIBLE).least_bytes(4) == 3 * 10 * (4 + 4)


def test_the_shapes_that_are_measured() -> None:
    found = list(cases())
    assert {c.size for c in found} == {32000, 50257, 128256, 152064}
    assert {c.rows for c in found} == {1, 4, 16, 64, 256}
    assert {c.streams for c in found if c.rule is RuleKind.SUM} == {2, 3, 4}
    assert {c.rule for c in found} == set(RuleKind) and len(set(found)) == len(found)


def test_the_page() -> None:
    line = {"rule": "SUM", "size": 32000, "rows": 4, "streams": 3, "bytes": 2e6}
    times = {"graph_s": 1e-5, "triton_s": 2e-4, "torch_s": 3e-4, "share": 0.5}
    found = {"gpu": "G", "versions": {"torch": "2"}, "dtype": "bfloat16", "copy_bytes_per_s": 4e11}
    lines = markdown(found | {"lines": [line | times]}).splitlines()
    assert lines[2] == "G, torch 2, bfloat16. A copy moves 400 GB/s."
    assert lines[-1] == "| sum | 32000 | 4 | 3 | 2.0 | 10 | 0.50 | 200 | 300 |"
