"""`coxswain::adapter_sum` and `residual_sum` on CUDA devices: Triton, with the pass's tables.

Beside `adapters.kernels.operation`, whose torch path stays for whatever else has tensors there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapters.kernels import operation
from adapters.kernels.triton_sum import AdapterTables, add_adapters

_tables: AdapterTables | None = None
"""The tables of the forward pass that runs in this process."""

_libraries: dict[str, torch.library.Library] = {}
"""By dispatch key; what is registered holds as long as these live."""


@contextmanager
def adding(tables: AdapterTables) -> Iterator[None]:
    """Makes the layers that run inside add what the tables say."""
    global _tables
    _tables = tables
    try:
        yield
    finally:
        _tables = None


def register(key: str = "CUDA") -> None:
    """Uses Triton for tensors on some devices from now on.

    Args:
        key: PyTorch's dispatch key of the devices.
    """
    if key not in _libraries:
        library = _libraries[key] = torch.library.Library("coxswain", "FRAGMENT")
        library.impl("adapter_sum", _add, key)
        library.impl("residual_sum", _add_to_states, key)


def _add(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    sizes: list[int],
    split: bool = False,
) -> None:
    if _tables is not None:
        over_ranks = operation.sum_over_ranks if split else None
        add_adapters(y, x, a, b, sizes, _tables, over_ranks)


def _add_to_states(
    y: torch.Tensor,
    residual: torch.Tensor | None,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    filled: torch.Tensor,
    layer: int = -1,
) -> None:
    del filled, layer  # recorded launches must not depend on them
    if _tables is not None:
        x = y if residual is None else y + residual
        add_adapters(y, x, a, b, [y.shape[1]], _tables, routed=False)
