"""Model Runner V2 and CUDA graphs, emulated: runs `tests/emulated` in a process of its own."""

from __future__ import annotations

import importlib.util

import pytest

from tests.interpreted import interpret

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
    ),
]

PLUGIN = ("-p", "tests.emulated.plugin")
"""Prepares the process, before anything imports Triton or vLLM."""


def test_emulated(capsys: pytest.CaptureFixture[str]) -> None:
    printed = interpret(*PLUGIN, "tests/emulated")
    with capsys.disabled():
        for line in printed.splitlines():
            if "largest error" in line or " passed in " in line:
                print(f"\nemulated: {line}")
