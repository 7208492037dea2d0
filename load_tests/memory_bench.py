"""What stays in memory: the figures of docs/internals/decisions/0015.

    python -m load_tests.memory_bench       # some minutes; times want a quiet machine

oneDNN's cache of compiled products at several capacities, each in a process of its own, and what
reading tensors leaves behind, with the safetensors library and with `adapters.tensors`. CPU only.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters.tensors import TensorFile

SHAPES = ((256, 256), (1024, 256), (256, 512), (768, 256))
LAYERS = 8
CAPACITIES = (1024, 256, 128, 64, 0)
STEPS = 1200
MODULES = 224


def products() -> None:
    """Memory taken and time per step of vLLM's linear layers, under this process's capacity."""
    import vllm._custom_ops as ops

    rng = random.Random(0)
    layers = [(ops.create_onednn_mm(torch.randn(n, k).t(), 128), k)
              for _ in range(LAYERS) for n, k in SHAPES]  # fmt: skip
    inputs = {k: torch.randn(512, k) for _, k in SHAPES}

    def step(tokens: int) -> None:
        for layer, k in layers:
            ops.onednn_mm(layer, inputs[k][:tokens], None)

    step(7)
    before, cells = _anonymous_mib(), []
    for most in (512, 16):
        begun = time.perf_counter()
        for _ in range(STEPS):
            step(rng.randint(1, most))
        cells.append(f"{(time.perf_counter() - begun) / STEPS * 1e3:.2f}")
    capacity = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    print(f"| {capacity} | {_anonymous_mib() - before:.0f} | {' | '.join(cells)} |", flush=True)


def _anonymous_mib() -> float:
    found = re.search(r"^Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def reading(folder: Path) -> None:
    """Objects left behind by each tensor, and the time of both readers."""
    file = folder / "adapter.safetensors"
    save_file({f"{i}.{x}": torch.randn((16, 2048) if x == "a" else (2048, 16))
               for i in range(MODULES) for x in "ab"}, file)  # fmt: skip
    names = [f"{i}.{x}" for i in range(MODULES) for x in "ab"]

    def library() -> None:
        with safe_open(file, "pt") as opened:
            for name in names:
                opened.get_slice(name)[0:16].to(torch.bfloat16)

    def ours() -> None:
        opened = TensorFile(file)
        for name in names:
            opened[name][0:16].to(torch.bfloat16)

    for name, read in (("safetensors", library), ("adapters.tensors", ours)):
        print(f"{name}: {_left(read, 20) / len(names):.2f} objects left by each tensor, "
              f"{min(_seconds(read) for _ in range(5)) * 1e3:.1f} ms for {len(names)}")  # fmt: skip


def _left(read: Callable[[], None], times: int) -> float:
    read()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        read()
    gc.collect()
    return (sys.getallocatedblocks() - before) / times


def _seconds(read: Callable[[], None]) -> float:
    begun = time.perf_counter()
    read()
    return time.perf_counter() - begun


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.memory_bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--products", action="store_true", help="one row, in this process")
    if parser.parse_args().products:
        products()
        return
    print("| capacity | MiB taken | ms per step, 1 to 512 tokens | ms per step, 1 to 16 tokens |")
    print("|---|---|---|---|", flush=True)
    for capacity in CAPACITIES:
        environ = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(capacity)}
        command = [sys.executable, "-m", "load_tests.memory_bench", "--products"]
        subprocess.run(command, env=environ, check=True, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        reading(Path(folder))


if __name__ == "__main__":
    main()
