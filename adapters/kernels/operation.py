"""The adapter sum as one operation, `coxswain::adapter_sum`.

What is added changes with every step, so compiled code calls an operation that it cannot look
into; what it adds is set around each forward pass. On CPUs with a compiler the operation itself
is C++ (`native.cpp`), so that a layer without adapters costs a call and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adapters.kernels import native
from adapters.kernels.gated import Bundle, Group, add_adapters, bundled


@dataclass(frozen=True)
class Added:
    """What the layers of one forward pass add.

    Args:
        rows: what is computed row by row; None for nothing.
        groups: what is computed group by group.
    """

    rows: native.Rows | None
    groups: tuple[Group | Bundle, ...]


def added(groups: Sequence[Group], total: int, dtype: torch.dtype) -> Added:
    """How some groups are computed.

    Args:
        groups: of one batch.
        total: T, tokens of the batch.
        dtype: of its activations.
    """
    if not groups or not _native or dtype not in native.DTYPES:
        return Added(None, bundled(groups))
    small = [group for group in groups if native.suits(group, total)]
    large = [group for group in groups if not native.suits(group, total)]
    return Added(native.rows(small, total) if small else None, bundled(large))


_groups: Sequence[Group | Bundle] = ()
"""Of the forward pass that runs, in this process."""
_native = False
_nothing = native.Rows.none()


@contextmanager
def adding(what: Added) -> Iterator[None]:
    """Makes the layers that run inside add something."""
    global _groups
    _groups = what.groups
    if _native:
        _set(what.rows or _nothing, bool(what.groups))
    try:
        yield
    finally:
        _groups = ()
        if _native:
            _set(_nothing, False)


def _set(rows: native.Rows, others: bool) -> None:
    torch.ops.coxswain.adapter_rows(
        rows.rows, rows.routes, rows.spans, rows.gates, rows.softmax, rows.counts, rows.widest,
        others,
    )  # fmt: skip


def build() -> None:
    """Uses C++ from now on, if this machine can compile it."""
    global _native
    _native = native.build()


def _add_groups(
    y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], sizes: list[int]
) -> None:
    if _groups:
        add_adapters(y, x, a, b, sizes, _groups)


def _changes_y(
    y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], sizes: list[int]
) -> None:
    """What a compiler needs to know: it changes `y` in place and returns nothing."""


_library = torch.library.Library("coxswain", "FRAGMENT")
for _name in ("adapter_sum", "adapter_groups"):
    _library.define(f"{_name}(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, int[] sizes) -> ()")
    # Wherever there is nothing better; the C++ kernel registers itself for the CPU.
    _library.impl(_name, _add_groups, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coxswain::{_name}", _changes_y, lib=_library)
