"""The worker's Triton read-out, in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest

from tests.interpreted import interpret


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)
def test_interpreted() -> None:
    interpret("tests/steering/worker/interpreted/test_triton_readout.py")
