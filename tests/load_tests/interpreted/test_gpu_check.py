"""The GPU's check, rehearsed: it passes as the kernels are, and fails when one is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels import triton_sum
from adapters.kernels.lines import Lines
from adapters.kernels.triton_kernels import expand
from adapters.kernels.triton_sum import add_adapters
from load_tests.gpu_check import kernels, recorded
from load_tests.gpu_check.__main__ import main
from load_tests.gpu_check.sections import here
from steering.kernels import triton_mix
from steering.kernels.triton_finish import finish
from steering.plan import RuleKind


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, batches = kernels.shapes()[:1], kernels.batches()[:1]
    monkeypatch.setattr(kernels, "shapes", lambda: shapes)
    monkeypatch.setattr(kernels, "batches", lambda: batches)


def checked(only: str, folder: Path) -> tuple[int, dict[str, Any]]:
    out = folder / "found.json"
    status = main(["--only", only, "--out", str(out)], run=here)
    found = json.loads(out.read_text())
    assert [section["letter"] for section in found["sections"]] == only.split(",")
    return status, found


class Wrong:
    """A kernel that goes wrong after it did its work.

    Args:
        kernel: the right one.
        spoil: changes what its arguments hold.
    """

    def __init__(self, kernel: Any, spoil: Callable[..., object]) -> None:
        self._kernel, self._spoil = kernel, spoil

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **static: Any) -> None:
            self._kernel[grid](*args, **static)
            self._spoil(*args)

        return launch


def test_the_kernels_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = checked("A,B,C,D", tmp_path)
    assert status == 0 and not found["failed"]
    assert found["interpreted"] and found["device"] is None
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["triton"]
    sums, reads, replays, waits = (section["data"] for section in found["sections"])
    for dtype, allowed in sums["allowed"].items():
        assert 0 < sums["worst"][dtype] <= allowed
    assert set(reads["worst"]) == {kind.name for kind in RuleKind}
    assert all(0 < error < 1e-3 for error in reads["worst"].values())
    assert 0 < reads["reports"] < 1e-3 and reads["wrong"] == 0
    assert replays["replays"] == recorded.REPLAYS and not any(replays["differ"].values())
    assert waits["steps"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No NVIDIA GPU: a rehearsal")
    assert [line.split()[:2] for line in lines[2:6]] == [[letter, "PASS"] for letter in "ABCD"]
    assert lines[6] == "Nothing failed."


def test_times_are_not_taken_from_the_interpreter(tmp_path: Path) -> None:
    status, found = checked("E,F", tmp_path)
    times, toy = found["sections"]
    assert status == 0
    assert times["status"] == "SKIPPED" and "4 cases agree" in times["figure"]
    assert toy["status"] == "PASS" and toy["data"] == {"steps": 2, "differ": 0, "worst": 0}


@pytest.mark.usefixtures("small")
def test_a_wrong_adapter_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Wrong(expand, lambda y, *_: y.mul_(1.05))
    monkeypatch.setattr(triton_sum, "expand", wrong)
    status, found = checked("A,E", tmp_path)
    assert status == 1 and found["failed"] == ["A", "E"]
    assert "rows without an adapter changed" in found["sections"][0]["figure"]
    assert "AssertionError" in found["sections"][1]["figure"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("by", [0.01, math.nan])
def test_a_wrong_read_out_kernel_fails(
    by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*args: Any) -> None:
        args[5][0].add_(by)  # the scores

    monkeypatch.setattr(triton_mix, "finish", Wrong(finish, spoil))
    status, found = checked("B", tmp_path)
    assert status == 1 and found["failed"] == ["B"]
    assert "numbers wrong" in found["sections"][0]["figure"]


def test_tables_that_a_graph_does_not_read_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = triton_sum.AdapterTables.write, list[Any]()

    def once(tables: Any, lines: Lines, *rest: Any) -> None:
        # As if the first ones, which a graph reads, lay elsewhere from the second step on.
        if tables not in seen or tables is not seen[0]:
            write(tables, lines, *rest)
        seen.append(tables)

    monkeypatch.setattr(recorded, "REPLAYS", 2)
    monkeypatch.setattr(triton_sum.AdapterTables, "write", once)
    status, found = checked("C", tmp_path)
    assert status == 1
    assert found["sections"][0]["data"]["differ"] == {"adapter sum": 1, "read-out": 0}


def test_a_wait_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(*args: Any) -> None:
        add_adapters(*args)
        args[0].sum().item()

    monkeypatch.setattr(recorded, "add_adapters", waiting)
    status, found = checked("D", tmp_path)
    assert status == 1 and found["sections"][0]["figure"].startswith("CaptureError")
