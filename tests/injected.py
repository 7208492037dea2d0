"""Failures inside a real engine's worker while it loads a set of adapters, at every point of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch

from steering.worker.adapting import sets as lora_sets

Point = Literal["read", "pack", "fill", "half"]
"""read   while the files are read: after some layers
pack   where vLLM packs the layers that it has fused
fill   before a layer's slot is filled; the ones before it are
half   when A of a layer is in its slot and B is not
"""

POINTS: tuple[Point, ...] = ("read", "pack", "fill", "half")


class Injected(Exception):
    """The failure; no class that anything in the engine knows."""


@contextmanager
def failing(manager: Any, point: Point, after: int, error: BaseException) -> Iterator[None]:
    """Lets every load of a worker fail.

    Args:
        manager: the worker's SetManager.
        point: where.
        after: how many layers are read, or filled, before.
        error: what is raised.
    """
    slots = manager._adapter_manager
    with ExitStack() as stack:
        if point == "read":
            stack.enter_context(patch.object(lora_sets, "load_set", _cut(after, error)))
        elif point == "pack":
            fails = _raiser(error)
            stack.enter_context(patch.object(slots, "_create_merged_loras_inplace", fails))
        else:
            layer = list(slots.modules.values())[after]
            fails = _raiser(error) if point == "fill" else _half(layer, error)
            # Below what clears the slot, as where vLLM's own copy fails.
            stack.enter_context(patch.object(layer.set_lora.__self__, "_set", fails))
        yield


def _raiser(error: BaseException) -> Any:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


def _cut(after: int, error: BaseException) -> Any:
    whole: Any = vars(lora_sets)["load_set"]

    def load_set(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, part in enumerate(whole(*args, **kwargs)):
            if i == after:
                raise error
            yield part

    return load_set


def _half(layer: Any, error: BaseException) -> Any:
    def fails(index: int, lora_a: Any, lora_b: Any) -> None:
        layer.reset_lora(index)
        for into, part in zip(layer.lora_a_stacked, _several(lora_a), strict=False):
            if part is not None:
                into[index, 0, : part.shape[0], : part.shape[1]] = part
        raise error

    return fails


def _several(parts: Any) -> list[torch.Tensor | None]:
    return parts if isinstance(parts, list) else [parts]


def runner_of(llm: Any) -> Any:
    """The model runner of an engine whose worker runs in this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner


def manager_of(llm: Any) -> Any:
    """The SetManager of an engine whose worker runs in this process."""
    return runner_of(llm).lora_manager


def content(manager: Any, slot: int) -> float:
    """A number that tells one slot's content from another's."""
    total = 0.0
    for i, module in enumerate(manager._adapter_manager.modules.values()):
        for j, tensor in enumerate((*module.lora_a_stacked, *module.lora_b_stacked)):
            total += (i + 1) * (j + 1) * float(tensor[slot].double().abs().sum())
    return total


def filled(manager: Any) -> list[int]:
    """The slots that hold a number other than 0, in any layer."""
    found = set()
    for module in manager._adapter_manager.modules.values():
        for tensor in (*module.lora_a_stacked, *module.lora_b_stacked):
            found |= {i for i in range(tensor.shape[0]) if tensor[i].count_nonzero()}
    return sorted(found)
