"""The adapter sum as one operation, `coxswain::adapter_sum`; `residual_sum` is the same for the
output of a decoder layer.

What is added changes with every step, so compiled code calls an operation that it cannot look
into; what it adds is set around each forward pass. On CPUs with a compiler the operation itself
is C++ (`native.cpp`), so that a layer without adapters costs a call and nothing else.

Of a layer whose input is split over the ranks of tensor parallelism each rank adds its part of the
products, and the layer sums them as it sums its own. Only learned gates need all of the input:
their scores are summed over the ranks before they choose (`split`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adapters.kernels import native
from adapters.kernels.gated import Bundle, Group, add_adapters, add_to_states, bundled
from adapters.kernels.judging import Judge, judge_all


@dataclass(frozen=True)
class Added:
    """The additions of all layers in one forward pass.

    Args:
        rows: what is computed row by row; None for nothing.
        groups: what is computed group by group.
        judges: what decides gates of these.
    """

    rows: native.Rows | None
    groups: tuple[Group | Bundle, ...]
    judges: tuple[Judge, ...] = ()


def added(
    groups: Sequence[Group], total: int, dtype: torch.dtype, judges: Sequence[Judge] = ()
) -> Added:
    """How some groups are computed.

    Args:
        groups: of one batch.
        total: T, tokens of the batch.
        dtype: of its activations.
        judges: of gates of the groups.
    """
    if not groups or not _native or dtype not in native.DTYPES:
        return Added(None, bundled(groups), tuple(judges))
    small = [group for group in groups if native.suits(group, total)]
    large = [group for group in groups if not native.suits(group, total)]
    return Added(native.rows(small, total) if small else None, bundled(large), tuple(judges))


_groups: Sequence[Group | Bundle] = ()
"""The groups of the forward pass that runs in this process."""
_judges: Sequence[Judge] = ()
_native = False
"""Whether C++ computes rows."""
_loaded = False
"""Whether C++ is the operation, rows or not."""
_nothing = native.Rows.none()


@contextmanager
def adding(what: Added) -> Iterator[None]:
    """Makes the layers that run inside add something."""
    global _groups, _judges
    _groups, _judges = what.groups, what.judges
    if _loaded:
        _set(what.rows or _nothing, bool(what.groups or what.judges))
    try:
        yield
    finally:
        _groups, _judges = (), ()
        if _loaded:
            _set(_nothing, False)


def _set(rows: native.Rows, others: bool) -> None:
    torch.ops.coxswain.adapter_rows(
        rows.rows, rows.routes, rows.spans, rows.gates, rows.softmax, rows.counts, rows.widest,
        others,
    )  # fmt: skip


def build(agree: Callable[[bool], bool] = bool) -> None:
    """Uses C++ from now on, if this machine can compile it.

    Args:
        agree: whether all ranks of a model say so; they must do the same, since they sum scores.
    """
    global _loaded, _native
    _loaded = native.build()
    _native = agree(_loaded)


def _add_groups(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    sizes: list[int],
    split: bool = False,
) -> None:
    if _groups:
        add_adapters(y, x, a, b, sizes, _groups, sum_over_ranks if split else None)


def _changes_y(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    sizes: list[int],
    split: bool = False,
) -> None:
    """What a compiler needs to know: it changes `y` in place and returns nothing."""


def _add_to_states(
    y: torch.Tensor,
    residual: torch.Tensor | None,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    filled: torch.Tensor,
    layer: int = -1,
) -> None:
    if _judges:
        judge_all(_judges, y, residual, layer)
    if _groups:
        add_to_states(y, residual, a, b, filled, _groups)


def _changes_states(
    y: torch.Tensor,
    residual: torch.Tensor | None,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    filled: torch.Tensor,
    layer: int = -1,
) -> None:
    """As `_changes_y`."""


_all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None


def split_over_ranks(all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Tells how layers whose input is split over processes sum what each has of it.

    Args:
        all_reduce: float32 → the sum of every rank's, the same numbers on all of them.
    """
    global _all_reduce
    _all_reduce = all_reduce


def sum_over_ranks(part: torch.Tensor) -> None:
    """Makes a part, float32, the sum of every rank's; all ranks call it in the same order."""
    if _all_reduce is None:
        raise RuntimeError("a layer is split over ranks, and nothing sums over them")
    part.copy_(_all_reduce(part))


_library = torch.library.Library("coxswain", "FRAGMENT")
for _name in ("adapter_sum", "adapter_groups"):
    _library.define(
        f"{_name}(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, int[] sizes, bool split=False)"
        " -> ()"
    )
    # Wherever there is nothing better; the C++ kernel registers itself for the CPU.
    _library.impl(_name, _add_groups, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coxswain::{_name}", _changes_y, lib=_library)
for _name in ("residual_sum", "residual_groups"):
    _library.define(
        f"{_name}(Tensor(a!) y, Tensor? residual, Tensor[] a, Tensor[] b, Tensor filled, "
        "int layer=-1) -> ()"
    )
    _library.impl(_name, _add_to_states, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coxswain::{_name}", _changes_states, lib=_library)
_library.define("sum_over_ranks(Tensor(a!) part) -> ()")
_library.impl("sum_over_ranks", sum_over_ranks, "CompositeExplicitAutograd")
