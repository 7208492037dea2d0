"""The read-out's Triton kernels, as far as a machine without a GPU can tell: they are interpreted
against the definition, and compiled to machine code for NVIDIA GPUs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.compiled import POINTERS, compiled
from tests.interpreted import interpret
from tests.tiers import mostly_nightly

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)

STREAMS = 3
SHARED = 99 * 1024
"""Bytes of shared memory that a block of 8.6 and 8.9 has."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", ["test_triton_mix"])
def test_interpreted(module: str) -> None:
    interpret(f"tests/steering/kernels/interpreted/{module}.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", mostly_nightly([80, 90], [90]))
@pytest.mark.parametrize("dtype", mostly_nightly(POINTERS, ["bfloat16"]))
def test_compiles_for_nvidia_gpus(
    dtype: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as machine code, with everything that a launch may be asked for, and with nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import torch

    from steering.kernels import triton_finish, triton_nucleus
    from steering.kernels import triton_kernels as kernels
    from steering.kernels.triton_mix import KEY_BITS, Blocks

    values = POINTERS[dtype]
    sizes = ("i32",) * STREAMS
    source = ((values,) * STREAMS, sizes, sizes, sizes, "*u8")
    read: dict[str, Any] = {"source": source}
    rules: dict[str, Any] = {"rules": (("*fp32",) * 7, ("i32",) * 7, "*u8", "i32")}
    row: dict[str, Any] = {"coef": ("*fp32", "i32")} | rules
    row |= {"more": ("*fp32", "*fp32", "i32"), "reported": "*fp32"}
    row |= {"out": ("*fp32", "i32", "i32", "*fp32"), "found": "*fp32"}
    shift = 32 - KEY_BITS[getattr(torch, dtype)]
    for rows, everything in ((1, True), (256, True), (256, False)):
        cut = Blocks.of(rows)
        static = {"STREAMS": STREAMS, "MARKED": everything}
        flags: dict[str, Any] = dict.fromkeys(("RULES", "LACKING"), everything)
        flags |= {"CANDIDATES": 20 * everything, "PLACES": 32, "REPORTS": everything}
        blocks = {"BLOCK": cut.size, "BLOCKS": 262144 // cut.size}
        first = compiled(
            kernels.first,
            read | row | {"size": "i32"},
            static | flags | {"BLOCK": cut.size},
            arch,
            cut.warps,
        )
        built = [first]
        if everything:
            narrow = {"found": "*fp32", "bounds": "*i32", "counts": "*fp32"}
            narrow |= {"turn": "i32", "size": "i32"}
            for turn in ({"FIRST": True, "LAST": False}, {"FIRST": False, "LAST": True}):
                own = {"STREAMS": STREAMS, "MARKED": True, "SHIFT": shift}
                types = read | rules | narrow
                built.append(
                    compiled(triton_nucleus.narrow, types, own | turn | blocks, arch, cut.warps)
                )
            types = read | row | {"bounds": "*i32", "counts": "*fp32", "turns": "i32"}
            built.append(
                compiled(
                    triton_finish.finish,
                    types | {"size": "i32"},
                    static | flags | {"SHIFT": shift} | blocks,
                    arch,
                    cut.warps,
                )
            )
        for kernel in built:
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= SHARED
            # Scores are read 16 bytes at a time.
            assert "ld.global.v4" in kernel.asm["ptx"]
    types = {"reported": "*fp32", "measured": "*fp32", "numbers": "*fp32"}
    types |= {"choices": "*i64", "blocks": "i32"}
    assert compiled(kernels.compare, types, {"BLOCKS": 64}, arch, 4).asm["cubin"]
