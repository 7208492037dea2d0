"""The Triton kernels, as far as a machine without a GPU can tell: they are interpreted against the
definition, and compiled to machine code for NVIDIA GPUs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.compiled import POINTERS, compiled
from tests.interpreted import interpret
from tests.tiers import mostly_nightly

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", ["test_triton_sum", "test_kernel_bench"])
def test_interpreted(module: str) -> None:
    interpret(f"tests/adapters/interpreted/{module}.py")


@pytest.mark.slow
@pytest.mark.parametrize("arch", mostly_nightly([80, 90], [90]))
@pytest.mark.parametrize("dtype", mostly_nightly(POINTERS, ["bfloat16"]))
def test_compiles_for_nvidia_gpus(
    dtype: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as machine code, within the shared memory of a block (99 KiB on 8.6 and 8.9)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from adapters.kernels import triton_kernels as kernels
    from adapters.kernels.triton_sum import Blocks

    values, layers = POINTERS[dtype], 3
    steps = {"split_step": "i32", "slice_step": "i32"}
    tables = {"tiles": "*i32", "tokens": "*i32", "table": "*i32"}
    for tokens, ranks in ((1, 16), (200, 64), (4096, 256)):
        cut = Blocks.of(tokens, ranks)
        shrunk = compiled(
            kernels.shrink,
            {"x": values, "x_row": "i32", "x_column": "i32", "into": "i32"}
            | {"a": (values,) * layers, "a_slot": "i32", "a_row": "i32"}
            | {"u": "*fp32", "splits": "i32"}
            | steps
            | tables,
            {"RANKS": ranks, "TOKENS": cut.tokens, "ROWS": cut.rows, "INTO": cut.into}
            | {"WIDE": False},
            arch,
            cut.warps,
        )
        gated = compiled(
            kernels.gate,
            {"u": "*fp32", "splits": "i32"}
            | steps
            | {"v": values, "scores": "*fp32", "counting": "*i32", "lines": "*i32"}
            | {"table": "*i32", "counts": "*i32"},
            {"RANKS": ranks, "SPLIT": ranks > 64},
            arch,
            4 if ranks <= 64 else 8,
        )
        scored = compiled(
            kernels.score,
            {"u": "*fp32", "splits": "i32"}
            | steps
            | {"scores": "*fp32", "lines": "*i32", "table": "*i32"},
            {"RANKS": ranks},
            arch,
            4,
        )
        expanded = compiled(
            kernels.expand,
            {"y": values, "y_row": "i32", "y_column": "i32", "v": values, "slice_step": "i32"}
            | {"b": (values,) * layers, "b_slots": ("i32",) * layers, "b_steps": ("i32",) * layers}
            | {"room": "i32", "sizes": ("i32",) * layers}
            | tables,
            {"RANKS": ranks, "TOKENS": cut.tokens, "COLUMNS": cut.columns, "OUT": cut.out}
            | {"ACROSS": tokens > 1, "WIDE": False},
            arch,
            cut.warps,
        )
        for kernel in (shrunk, scored, gated, expanded):
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= 99 * 1024
        if dtype != "float32":
            # Weights are read 16 bytes at a time, and multiplied by tensor cores.
            for kernel in (shrunk, expanded):
                assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
                assert "mma" in kernel.asm["ptx"]
