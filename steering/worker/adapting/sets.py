"""What vLLM's cache of LoRA adapters loads for us: sets, of which a part can be read ahead.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from adapters.errors import DoesNotFit
from adapters.kernels.gated import NOTHING
from adapters.kernels.judging import LoadedCondition
from adapters.load import conditional, load_conditions, load_set, normed, verify
from adapters.sets import AdapterSet, Layout
from steering.worker import ranks
from steering.worker.adapting.base_layers import EngineLayers
from steering.worker.adapting.layers import StreamAdapters, fit


def arrange(manager: Any) -> None:
    """Rearranges vLLM's slots; after the layers are wrapped, before they run.

    On CPUs their B is laid out column by column, because the kernels read some of its columns and
    never some of its rows; shapes stay as vLLM expects them. Everywhere a slot that gets another
    set is cleared only as far as it was filled: clearing all of a large slot holds up a step.
    Layers whose input is split over ranks are kept apart from others.
    """
    for module in manager.modules.values():
        a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
        if not isinstance(a, tuple) or not isinstance(b, tuple) or any(t.dim() != 4 for t in b):
            continue
        if current_platform.is_cpu():
            module.lora_b_stacked = tuple(torch.zeros_like(t.mT.contiguous()).mT for t in b)
        _Filled(module)
        if ranks.sees_a_part(module.base_layer):
            module.punica_wrapper = module.punica_wrapper.for_parts()


class _Filled:
    """How far the slots of one layer are filled; beyond, they are 0.

    Args:
        layer: takes its two methods from here.
    """

    def __init__(self, layer: Any) -> None:
        self._layer, self._set = layer, layer.set_lora
        self._ranks = [0] * layer.lora_a_stacked[0].shape[0]
        layer.set_lora, layer.reset_lora = self.set, self.reset

    def set(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fills a slot; as vLLM's `set_lora`, which clears it first."""
        try:
            self._set(index, lora_a, lora_b)
        finally:  # also what broke off has to be cleared
            parts = [*_several(lora_a), *(b.mT for b in _several(lora_b))]
            self._ranks[index] = max((part.shape[0] for part in parts), default=0)

    def reset(self, index: int) -> None:
        """Clears a slot."""
        rank = self._ranks[index]
        for a, b in zip(self._layer.lora_a_stacked, self._layer.lora_b_stacked, strict=True):
            a[index, 0, :rank] = 0
            b[index, 0, :, :rank] = 0
        self._ranks[index] = 0
        if hasattr(self._layer, "filled"):
            self._layer.filled[index] = NOTHING


_Part = tuple[str, LoRALayerWeights]
"""A layer's name and what a set does to it."""


def _several(parts: Any) -> list[torch.Tensor]:
    """What vLLM gives for a layer: one tensor, or one or None for each that is packed in it."""
    return [part for part in (parts if isinstance(parts, list) else [parts]) if part is not None]


class _Loaded(LoRAModel):
    """A set's weights, as vLLM holds them.

    Args:
        found: the set.
        set_id: what vLLM calls it.
        weights: by layer.
        device: that its conditions run on.
    """

    def __init__(
        self,
        found: AdapterSet,
        set_id: int,
        weights: dict[str, LoRALayerWeights],
        device: torch.device,
    ) -> None:
        super().__init__(set_id, found.rank, weights)
        self.name = found.name
        self.layouts = {owner: found.layout(owner) for owner in found.owners}
        self.conditions = load_conditions(found, device)


READINGS = 4
"""Sets that are read ahead at the same time; they hold memory until they are loaded."""


class _Reading:
    """A set's layers, read bit by bit. Iterating gives all of them.

    Args:
        parts: what remains to be read; None where only some work was done.
    """

    def __init__(self, parts: Iterator[_Part | None]) -> None:
        self._parts = ranks.together(parts)
        self._read: list[_Part] = []

    def read(self, seconds: float) -> bool:
        """Reads for some time, at least one piece; whether that was the last."""
        until = time.monotonic() + seconds
        for part in self._parts:
            if part is not None:
                self._read.append(part)
            if ranks.anyone(time.monotonic() >= until):
                return False
        return True

    def __iter__(self) -> Iterator[_Part]:
        yield from self._read
        yield from (part for part in self._parts if part is not None)


class SetManager(LRUCacheWorkerLoRAManager):
    """vLLM's cache of adapters; what it loads is a set, as a whole or not at all."""

    _adapter_manager: StreamAdapters
    _ahead: dict[str, _Reading]
    _norms: dict[str, torch.Tensor]

    def adopt(self) -> None:
        """Prepares what this class adds to the manager that vLLM made."""
        self._ahead, self._norms = {}, {}

    @property
    def slots(self) -> dict[int, int]:
        """Set id → slot, of the sets that are in one."""
        ids = self._adapter_manager.lora_index_to_id
        return {set_id: slot for slot, set_id in enumerate(ids) if set_id is not None}

    @property
    def wrapped(self) -> dict[str, Any]:
        """Layer → vLLM's wrapper of it."""
        return self._adapter_manager.modules

    @property
    def layouts(self) -> dict[int, dict[str, Layout]]:
        """Set id → owner → layout."""
        held = self._adapter_manager.list_adapters()
        return {i: one.layouts for i, one in held.items() if isinstance(one, _Loaded)}

    @property
    def conditions(self) -> dict[int, dict[str, dict[str, LoadedCondition]]]:
        """Set id → owner → digest → when that artefact acts; of those with conditions."""
        held = self._adapter_manager.list_adapters()
        return {i: one.conditions for i, one in held.items()
                if isinstance(one, _Loaded) and one.conditions}  # fmt: skip

    # What the front end asks for, between two steps.

    def read_ahead(self, path: str, seconds: float) -> bool:
        """Reads a part of a set, which is then loaded faster; whether all of it is read.

        Args:
            path: the set's, as in its LoRA request.
            seconds: about how long to read.

        Raises:
            BadAdapter: as `load_set`.
            DoesNotFit: another set with its id is loaded.
        """
        found = AdapterSet.from_path(path)
        if self._holds(found.set_id, found.name):
            return True
        if path not in self._ahead:
            while len(self._ahead) >= READINGS:  # its caller has gone
                del self._ahead[next(iter(self._ahead))]
            self._ahead[path] = _Reading(self._parts(found))
        try:
            return self._ahead[path].read(seconds)
        except BaseException:
            del self._ahead[path]
            self._norms.clear()
            raise

    def load(self, path: str) -> None:
        """Brings a set into a slot.

        Raises:
            Exception: it could not be; nothing of it is left.
        """
        found = AdapterSet.from_path(path)
        self._holds(found.set_id, found.name)
        self.add_adapter(LoRARequest(**found.lora_request()))

    def unload(self, path: str) -> None:
        """Leaves nothing of a set, whatever of it there is."""
        self._ahead.pop(path, None)
        found = AdapterSet.from_path(path)
        if self._name(found.set_id) == found.name:
            self.remove_adapter(found.set_id)

    def _name(self, set_id: int) -> str | None:
        """The set that is loaded under an id; None if none is."""
        return getattr(self._adapter_manager.list_adapters().get(set_id), "name", None)

    def _holds(self, set_id: int, name: str) -> bool:
        """Whether a set is loaded.

        Raises:
            DoesNotFit: another one is loaded under its id.
        """
        held = self._name(set_id)
        if held not in (None, name):
            raise DoesNotFit(
                "another set of adapters is loaded under its id", field=name, value=set_id,
                allowed=f"once set {held} is unloaded",
            )  # fmt: skip
        return held is not None

    # What vLLM asks for.

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Before a step: its sets are in slots. The server has seen to that; for who has not,
        they are loaded here, once their files are what the sets say.
        """
        held = self.list_adapters()
        # Every rank loads them in this order; that of a set is each process's own.
        ordered = sorted(lora_requests, key=lambda request: request.lora_int_id)
        for request in ordered:
            if request.lora_int_id not in held:
                for member in AdapterSet.from_path(request.lora_path).members:
                    verify(member)
        super()._apply_adapters(ordered)
        for request in ordered:  # vLLM goes by the id alone
            self._holds(request.lora_int_id, request.lora_name)

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        found = AdapterSet.from_path(lora_request.lora_path)
        reading = self._ahead.pop(lora_request.lora_path, None) or _Reading(self._parts(found))
        try:
            weights = dict(reading)
        except BaseException:
            # Some ranks may know more norms than others, and would not do the same work again.
            self._norms.clear()
            raise
        return _Loaded(found, lora_request.lora_int_id, weights, self.device)

    def _parts(self, found: AdapterSet) -> Iterator[_Part | None]:
        """Per layer of the steered model that a set changes, its weights; None between steps."""
        self._check(found)
        manager = self._adapter_manager
        dtype, by_columns = self.lora_config.lora_dtype, current_platform.is_cpu()
        for owner in found.owners:
            layers, layout = EngineLayers(manager, owner, self._norms), found.layout(owner)
            filled: set[str] = set()
            for module in normed(found, owner):
                for _ in layers.measure(module):
                    yield None
            for module, a, b in load_set(found, owner, dtype, layers, by_columns=by_columns):
                part = layers.slice(module)
                fit(part, owner, module, a, b)
                _adjust(b, layout, layers.layer(part).base_layer, f"{owner}: {module}")
                for name, rows in part.split(b):
                    if name in filled:
                        raise DoesNotFit("this layer is changed twice, under two names",
                                         field=f"{owner}: {module}")  # fmt: skip
                    filled.add(name)
                    yield name, LoRALayerWeights(name, len(a), len(a), a, rows, scaling=1.0)

    def _check(self, found: AdapterSet) -> None:
        if conditional(found):
            if not current_platform.is_cpu():
                raise DoesNotFit("adapters with conditions are served on CPUs only",
                                 field=found.name)  # fmt: skip
            if not ranks.alike():
                raise DoesNotFit(
                    "adapters with conditions are not served on more than two ranks on CPUs: what "
                    "vLLM sums differs there from rank to rank in its last bits, so they might "
                    "decide differently", field=found.name,
                )  # fmt: skip
        if any(member.routed for member in found.members) and not ranks.alike():
            why = (
                "packs are not served on more than two ranks on CPUs: what vLLM sums differs there "
                "from rank to rank in its last bits, so they might route a token differently"
            )
            raise DoesNotFit(why, field=found.name)
        limit = self.lora_config.max_lora_rank
        if found.rank > limit:
            raise DoesNotFit(
                "the set's rank", field=found.name, value=found.rank, allowed=f"≤ {limit}"
            )


def _adjust(b: torch.Tensor, layout: Layout, layer: Any, field: str) -> None:
    """Fits constants and diagonals to what the layer gives; changes B in place.

    Raises:
        DoesNotFit: a diagonal would not multiply the layer's bias.
    """
    scales = layout.diagonals and bool(b[:, layout.sums : layout.columns].any())
    if scales and layer.skip_bias_add and layer.bias is not None:
        why = "adapters that scale this layer's output are not served: its bias is added elsewhere"
        raise DoesNotFit(why, field=field)
    if layout.constants and ranks.sees_a_part(layer) and layer.tp_rank > 0:
        # The ranks' outputs are summed: one of them adds the constant.
        b[:, layout.products : layout.sums] = 0
