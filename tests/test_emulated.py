"""Model Runner V2 and CUDA graphs, emulated: runs tests in processes that are prepared for it.

`tests/emulated` has tests of the emulation and of what only it can show. The engine suite runs on
V2 as it is: its core here, all of it by `make test-nightly`.
"""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.interpreted import interpret

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
    ),
]

PLUGIN = ("-p", "tests.emulated.plugin")
"""Prepares the process, before anything imports Triton or vLLM."""

CORE = "tests/engine/test_exactness.py::test_mixed_batches_with_joins_and_leaves"
"""Of the engine suite: steps of all kinds of plans."""


def test_the_emulation_and_the_core_of_the_engine_suite(capsys: pytest.CaptureFixture[str]) -> None:
    show(capsys, interpret(*PLUGIN, CORE, "tests/emulated"))


@pytest.mark.nightly
def test_the_engine_suite(capsys: pytest.CaptureFixture[str]) -> None:
    show(capsys, interpret(*PLUGIN, "tests/engine", "--timeout=900"))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["two_ranks", "data_parallel"])
def test_several_processes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks and engines beside each other, which are prepared as they start."""
    tests = f"tests/fleet/test_{name}.py"
    show(capsys, interpret(tests, first="tests/emulated/children"))


def show(capsys: pytest.CaptureFixture[str], printed: str) -> None:
    """Prints how many tests passed, and their largest error."""
    with capsys.disabled():
        for line in printed.splitlines():
            if "largest error" in line or re.match(r"\d+ passed", line):
                print(f"\non V2: {line}", end="")
