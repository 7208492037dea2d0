"""What of the kernels' benchmark needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from load_tests.adapter_kernel_bench import Case, cases, markdown

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = str(tmp_path / "x")
    command = [sys.executable, "-m", "load_tests.adapter_kernel_bench", "--out", out]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip().endswith("There is no NVIDIA GPU here: nothing was measured.")
    assert not run.stdout and not list(tmp_path.iterdir())


def test_the_least_bytes() -> None:
    """By hand: A and B of the seven modules, then x and twice y of the four layers."""
    case = Case(hidden=8, kv=4, inner=16, rank=2, tokens=3, adapters=2)
    weights = 2 * ((8 * 3 + 16) + (8 + 8) + (8 * 2 + 32) + (16 + 8))
    activations = (8 + 2 * 16) + (8 + 2 * 8) + (8 + 2 * 32) + (16 + 2 * 8)
    assert case.least_bytes(2) == 2 * (2 * weights + 3 * activations)
    pack = Case(hidden=8, kv=4, inner=16, rank=2, tokens=3, adapters=1, pack=True)
    gates = 28 * (8 * 3 + 8 + 8 * 2 + 16)
    assert pack.least_bytes(1) == 28 * weights + gates + 3 * activations


def test_the_shapes_that_are_measured() -> None:
    found = list(cases())
    assert {c.hidden for c in found} == {4096, 5120}
    assert {c.tokens for c in found} == {1, 4, 16, 64, 256}
    assert {c.rank for c in found if not c.pack} == {8, 16, 64}
    assert {c.adapters for c in found} == {1, 8, 32, 128}
    assert {c.tokens for c in found if c.pack} == {1, 4, 16, 64, 256}
    assert all(c.adapters <= c.tokens for c in found) and len(set(found)) == len(found)


def test_the_page() -> None:
    row = {"hidden": 4096, "tokens": 4, "adapters": 2, "rank": 8, "pack": False, "bytes": 2e6}
    times = {"graph_s": 1e-5, "triton_s": 2e-4, "torch_s": 3e-4, "share": 0.5}
    found = {
        "gpu": "G",
        "versions": {"torch": "2"},
        "dtype": "bfloat16",
        "copy_bytes_per_s": 4e11,
    } | {"b": "by rows"}
    lines = markdown(found | {"rows": [row | times, row | times | {"pack": True}]}).splitlines()
    assert "G, torch 2, bfloat16, B by rows. A copy moves 400 GB/s." in lines[2]
    assert lines[-2] == "| 4096 | 4 | 2 | 8 | 2.0 | 10 | 0.50 | 200 | 300 |"
    assert "pack of 28, top 2" in lines[-1]
