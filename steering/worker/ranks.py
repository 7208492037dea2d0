"""What the ranks of tensor parallelism tell each other between steps, and inside layers.

Between steps they talk through the host, in numbers of any type. A call here is one that every rank
makes, in the same order: else they wait for each other for ever. So where work on one rank can fail
between two calls, as reading files can, it runs in `together`.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    model_parallel_is_initialized,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform

from adapters.errors import DoesNotFit, RankFault

Part = TypeVar("Part")


def several() -> bool:
    """Whether there is more than one rank; there is not where no engine is."""
    return size() > 1


def size() -> int:
    """How many ranks there are."""
    return get_tensor_model_parallel_world_size() if model_parallel_is_initialized() else 1


def first() -> bool:
    """Whether this is the first rank, which speaks for all."""
    return not several() or get_tp_group().rank_in_group == 0


def alike() -> bool:
    """Whether the ranks' hidden states are the same bits.

    Sums over more than two ranks are not, on CPUs: each rank adds in an order of its own.
    """
    return size() <= 2 or not current_platform.is_cpu()


def anyone(says: bool) -> bool:
    """Whether a rank says so."""
    return says if not several() else bool(_range(int(says))[1])


def everyone(says: bool) -> bool:
    """Whether all ranks say so."""
    return not anyone(not says)


def together(parts: Iterator[Part]) -> Iterator[Part]:
    """Work that has as many parts on every rank; where it fails on one, it fails on all.

    Raises:
        RankFault: another rank has failed, and says why.
    """
    if not several():
        yield from parts
        return
    end = object()
    while True:
        try:
            part: Any = next(parts, end)
        except RankFault:  # all know
            raise
        except BaseException:
            _range(_FAILED)
            raise
        _meet(_END if part is end else _PART)
        if part is end:
            return
        yield part


def added_up(part: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's `part`, of one shape, on the host; within a part of `together` only.

    Raises:
        RankFault: another rank has failed instead.
    """
    if not several():
        return part
    _meet(_SUM)
    found = part.cpu().contiguous().clone()
    torch.distributed.all_reduce(found, group=get_tp_group().cpu_group)
    return found


_PART, _END, _SUM, _FAILED = 1, 2, 3, 4
"""Where ranks meet. One that has failed waits for the others at their next such place."""


def _meet(place: int) -> None:
    """Goes on once all ranks are at this place.

    Raises:
        RankFault: one is not, and none goes on.
    """
    if _range(place) != (place, place):
        raise RankFault("another rank of the engine has failed")


def _range(number: int) -> tuple[int, int]:
    """The smallest and the largest of the ranks' numbers."""
    found = torch.tensor([-number, number])
    most = torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(found, most, group=get_tp_group().cpu_group)
    return -int(found[0]), int(found[1])


def the_firsts(numbers: torch.Tensor) -> torch.Tensor:
    """What the first rank has of numbers that all ranks compute, of one shape; in a step."""
    if not numbers.numel():
        return numbers
    found: torch.Tensor = get_tp_group().broadcast(numbers.contiguous())
    return found


def sees_a_part(layer: Any) -> bool:
    """Whether a linear layer's input is split over the ranks, whose outputs are then summed."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1


def own_outputs(layer: Any) -> slice | torch.Tensor:
    """Which of a linear layer's outputs this rank computes, in the order in which it does.

    Args:
        layer: one of vLLM's.

    Returns:
        What to index the outputs of all ranks with: all of them, or [out of this rank] int64.

    Raises:
        DoesNotFit: it is of a kind whose outputs are split in another way.
    """
    if not isinstance(layer, ColumnParallelLinear) or layer.tp_size == 1:
        return slice(None)
    if type(layer) not in (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear):
        why = "under tensor parallelism, adapters that need the base's weights are not served here"
        raise DoesNotFit(why, field=f"{layer.prefix} ({type(layer).__name__})")
    rank, own = layer.tp_rank, []
    if isinstance(layer, QKVParallelLinear):
        shared = rank // layer.num_kv_head_replicas
        heads, kv = layer.total_num_heads, layer.total_num_kv_heads
        sizes = [(heads * layer.head_size, layer.num_heads * layer.head_size, rank)]
        sizes += [(kv * width, layer.num_kv_heads * width, shared)
                  for width in (layer.head_size, layer.v_head_size)]  # fmt: skip
    else:
        merged = isinstance(layer, MergedColumnParallelLinear)
        outputs = layer.output_sizes if merged else [layer.output_size]
        sizes = [(size, size // layer.tp_size, rank) for size in outputs]
    start = 0
    for size, part, number in sizes:
        own.append(torch.arange(start + number * part, start + (number + 1) * part))
        start += size
    return torch.cat(own)
