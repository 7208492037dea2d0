"""The choice of a tap in Triton: in its interpreter, and compiled for GPUs."""

from __future__ import annotations

import importlib.util

import pytest

from tests.compiled import POINTERS, compiled
from tests.interpreted import interpret

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)

STREAMS = 4


def test_interpreted() -> None:
    interpret("tests/steering/kernels/interpreted/test_triton_layers.py")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles(dtype: str) -> None:
    from steering.kernels import triton_layers as kernels

    source = (
        (POINTERS[dtype],) * STREAMS,
        ("i64",) * STREAMS,
        ("i32",) * STREAMS,
        "*u8",
    )
    row = ("*fp32", "i64", "*fp32", "i64")
    fixed = {"STREAMS": STREAMS, "MARKED": True, "BLOCK": kernels.BLOCK}
    types = {"source": source, "row": row, "found": "*fp32"}
    built = [
        compiled(kernels.masses, {**types, "size": "i32"}, fixed, 90, 4),
        compiled(
            kernels.differ,
            {**types, "parts": "*fp32", "size": "i32"},
            {**fixed, "BLOCKS": 128},
            90,
            4,
        ),
        compiled(
            kernels.choose,
            {
                "row": row,
                "found": "*fp32",
                "parts": "*fp32",
                "out": ("*fp32", "i64", "*fp32"),
                "blocks": "i32",
            },
            {"STREAMS": STREAMS, "BLOCKS": 128, "PLACES": 4},
            90,
            4,
        ),
    ]
    for kernel in built:
        assert kernel.asm["cubin"]
