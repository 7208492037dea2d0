"""The seam to vLLM's LoRA: its slots, layer wrappers and loading are used, its arithmetic is not.

vLLM keeps one slot per LoRA request, wraps every linear layer and lets the scheduler admit at most
`max_loras` different ones per step. A slot of ours holds a *set* of adapters; what a token adds in
each layer is decided by `adapters.kernels.gated`. Besides the gates this cures a bug of the CPU
build, whose operations index the slots with −1 for tokens without an adapter, which gives them
another request's (vLLM issue 48421).

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from adapters.kernels import operation
from adapters.kernels.judging import PromptState
from adapters.kernels.operation import Added, added, adding
from steering.plan import AdapterUse
from steering.worker import ranks
from steering.worker.adapting.groups import Adapted
from steering.worker.adapting.layers import StreamAdapters
from steering.worker.adapting.sets import SetManager
from steering.worker.adapting.triton import Pass, Write, triton_adding
from steering.worker.plan.batches import Int64


def keep_compiling(vllm_config: VllmConfig) -> None:
    """Lets the CPU build compile the streams although LoRA is on; before they are built.

    vLLM switches compilation off there, for its own operations. Ours is one opaque operation.
    """
    compilation = vllm_config.compilation_config
    # Only vLLM's decision to compile, which it took back, leaves this behind.
    decided = "cpp.dynamic_threads" in compilation.inductor_compile_config
    if current_platform.is_cpu() and vllm_config.lora_config is not None and decided:
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE


def prepare(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Makes vLLM use our arithmetic in this process; before it wraps the model's layers.

    Raises:
        ValueError: the engine would split A by its rank, or run adapters beside the layers that
            they read.
    """
    if vllm_config.lora_config is None:
        return
    if vllm_config.lora_config.fully_sharded_loras:
        raise ValueError("adapters do not work with fully_sharded_loras")
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ValueError(
            "adapters do not work with VLLM_LORA_ENABLE_DUAL_STREAM=1: they multiply what the base"
            " has computed, so they cannot run beside it"
        )
    if current_platform.is_cpu():
        operation.build(ranks.everyone)
    operation.split_over_ranks(tensor_model_parallel_all_reduce)
    wrapper = f"{AdapterPunica.__module__}.{AdapterPunica.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: wrapper)
    LRUCacheWorkerLoRAManager._manager_cls = StreamAdapters
    # Else vLLM would also wrap the unembeddings; an adapter for one is refused when it is read.
    for module in model.modules():
        if getattr(module, "embedding_modules", None):
            vars(module)["embedding_modules"] = {}


class AdapterPunica(PunicaWrapperCPU):
    """Called by vLLM's LoRA layers with their input and the base's output."""

    split = False
    """Whether the layers that use this one see a part of their input each."""

    def for_parts(self) -> AdapterPunica:
        """The same for layers whose input is split over the ranks."""
        found = copy(self)
        found.split = True
        return found

    def update_metadata(self, *_: Any, **__: Any) -> None:
        """Nothing: vLLM's mapping of tokens to slots, a list built token by token, is not used."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **_: Any,
    ) -> None:
        """Adds the adapters' part to `y` [T, out] in place; x is [T, in]."""
        a, b, sizes = list(lora_a_stacked), list(lora_b_stacked), list(output_slices)
        torch.ops.coxswain.adapter_sum(y, x, a, b, sizes, self.split)


class LoraSeam:
    """Runs streams with the adapters of their requests.

    Args:
        runner: the worker's model runner, with LoRA enabled.
        streams: that run, twins included.
    """

    def __init__(self, runner: Any, streams: Sequence[str]) -> None:
        manager = runner.lora_manager
        # The runner names the class itself; nothing else of it is ours to choose.
        manager.__class__ = SetManager
        manager.adopt()
        self._sets: SetManager = manager
        self._dtype = runner.model_config.dtype
        self._last: dict[str, tuple[Sequence[Any], Any, Added]] = {}
        self._checked: tuple[Sequence[Any], Any] = ((), None)
        self._prompts: dict[tuple[str, str, str], PromptState] = {}
        self.triton = triton_adding(runner, streams)
        """None where torch does the work."""

    def adapted(
        self,
        uses: Sequence[tuple[AdapterUse, ...]],
        sets: Int64,
        counting: bool,
        request_ids: Sequence[str] = (),
        holds: Callable[[str], bool] = bool,
    ) -> Adapted | None:
        """The adapters of this step's requests, None if no request has any.

        Args:
            uses: [Q] the requests' adapters.
            sets: [Q] the ids of their sets, 0 for none.
            counting: whether routes are counted.
            request_ids: [Q].
            holds: whether the runner still has a request.

        Raises:
            RuntimeError: an adapter is not in the slot of its request's set. Ends the engine: the
                request must not run on what is there instead.
        """
        for key in [key for key in self._prompts if not holds(key[0])]:
            del self._prompts[key]
        if not any(uses):
            return None
        found = Adapted(
            uses, sets, self._sets.slots, self._sets.layouts, counting,
            conditions=self._sets.conditions, prompts=self._prompts, request_ids=request_ids,
        )  # fmt: skip
        # While the same requests decode on the same slots nothing of it changes.
        place = sets.tobytes(), tuple(found.slots.items())
        if self._checked[0] is not uses or self._checked[1] != place:
            found.check()
            self._checked = uses, place
        return found

    def warm_up(self) -> None:
        """Compiles what a step can need; before the first, and before graphs are captured."""
        if self.triton is not None:
            self.triton.warm_up([*self._sets.wrapped.values()])

    def writes(self, adapted: Adapted | None, passes: Sequence[Pass]) -> list[tuple[int, Write]]:
        """See `TritonAdding.writes`; nothing where torch does the work."""
        return [] if self.triton is None else self.triton.writes(adapted, passes)

    def put(self, write: Write, there: Sequence[torch.Tensor]) -> None:
        """See `TritonAdding.put`."""
        assert self.triton is not None
        self.triton.put(write, there)

    def routed(self, adapted: Adapted, stream: str) -> None:
        """See `TritonAdding.routed`: for passes that run outside of `adapting`."""
        if self.triton is not None:
            self.triton.routed(adapted, stream)

    def launching(self, stream: str) -> AbstractContextManager[None]:
        """See `TritonAdding.launching`; nothing where torch does the work."""
        return nullcontext() if self.triton is None else self.triton.launching(stream)

    def adapting(
        self, adapted: Adapted, one: Pass, device: torch.device, *, written: bool = False
    ) -> AbstractContextManager[None]:
        """Makes the layers that run inside add what one pass's requests want.

        Args:
            adapted: the adapters of this step's requests.
            one: the pass.
            device: of the stream.
            written: whether what `writes` returned for it is in its place.
        """
        if self.triton is not None:
            return self.triton.adapting(adapted, one, written=written)
        stream, owner, requests, total, active, ahead, lengths = one
        key = tuple(adapted.slots.items()), one.key
        last = self._last.get(stream)
        # While the same requests decode nothing of it changes; counts of routes are the step's own.
        if adapted.counting or last is None or last[0] is not adapted.uses or last[1] != key:
            groups = adapted.groups(stream, owner, requests, total, device, active)
            judges = []
            if ahead is not None and lengths is not None:
                judges = adapted.judges(stream, owner, requests, groups, ahead, lengths, device)
            last = adapted.uses, key, added(groups, total, self._dtype, judges)
            self._last[stream] = last
        return adding(last[2])
