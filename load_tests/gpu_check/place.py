"""Where kernels run: an NVIDIA GPU, or Triton's interpreter with emulated graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GPU = torch.cuda.is_available() and torch.version.cuda is not None
"""Whether there is an NVIDIA GPU that this PyTorch can use."""

DEVICE = torch.device("cuda" if GPU else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def graphs() -> Iterator[None]:
    """`torch.cuda.CUDAGraph` and `torch.cuda.graph` work inside, also without a GPU."""
    if GPU:
        yield
        return
    from tests.emulated.graphs import emulated

    with emulated():
        yield


@contextmanager
def no_waits() -> Iterator[None]:
    """Raises `RuntimeError` where the host would wait for the device.

    On a GPU PyTorch raises. Elsewhere everything inside is recorded in an emulated graph, whose
    capture raises where the host reads what lies on the device; `graphs` must be open.
    """
    if not GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so what a kernel reads before it was written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
