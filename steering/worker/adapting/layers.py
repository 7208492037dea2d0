"""The layers that adapters can change: vLLM's wrappers of them, stream by stream.

vLLM's manager takes one model with one table of packed layers (`qkv_proj` is q, k and v). Streams
of several families have several, which contradict each other, so each stream's layers are wrapped
with the table of its own model.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.utils import get_supported_lora_modules
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.utils import get_packed_modules_mapping

from adapters.errors import DoesNotFit
from adapters.formats.blocks import block_number
from steering.worker.adapting.blocks import adapt_blocks
from steering.worker.adapting.slots import Slots


@dataclass(frozen=True, eq=False)
class Slice:
    """A linear layer of a checkpoint, in the engine: a layer, or some parts of a packed one.

    Args:
        parts: as the adapter manager knows them, in the order of their output columns.
        sizes: columns of each part's output, over all ranks.
        into: columns of the input, over all ranks.
        layer: name of the wrapped layer that it is in.
        start: its first output in the layer's, over all ranks.
        order: [out] int64, which row of the checkpoint's weight each row of the engine's is; None
            where they lie alike.
    """

    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    into: int
    layer: str
    start: int = 0
    order: torch.Tensor | None = None

    @property
    def out(self) -> int:
        """Columns of its output, over all ranks."""
        return sum(self.sizes)

    def split(self, b: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """(part, its rows) of a matrix B [out, R] as in the checkpoint; strides stay."""
        if self.order is not None:
            b = b.mT[:, self.order].mT if b.stride(0) == 1 else b[self.order]
        return list(zip(self.parts, b.split(self.sizes), strict=True))


class StreamAdapters(Slots):
    """vLLM's manager of LoRA slots, for a model of several streams."""

    model: Any
    modules: dict[str, Any]
    packed_modules: dict[str, list[str]]

    def _create_lora_modules(self) -> None:
        outer = self.model
        if not hasattr(outer, "adapted_streams"):  # another engine in this process
            super()._create_lora_modules()
            return
        modules: dict[str, Any] = {}
        packed: dict[str, list[str]] = {}
        for stream, model in outer.adapted_streams.items():
            self.model, self.modules, self.packed_modules = model, {}, {}
            experts = {n for n, m in model.named_modules() if isinstance(m, MoERunner)}
            # Adapters for experts are refused when they are loaded: see `slices`.
            self.supported_lora_modules = [
                name
                for name in get_supported_lora_modules(model)
                if not any(expert.rsplit(".", 1)[-1] == name for expert in experts)
            ]
            self.packed_modules_mapping = packed_layers(model)
            _put_weights(model)
            super()._create_lora_modules()
            if outer.vectors:
                config = self.lora_config
                sizes = self.lora_slots, config.max_lora_rank, config.lora_dtype
                self.modules |= adapt_blocks(model, *sizes)
            modules |= {f"{stream}.{name}": layer for name, layer in self.modules.items()}
            packed |= {
                f"{stream}.{name}": [f"{stream}.{part}" for part in parts]
                for name, parts in self.packed_modules.items()
            }
        self.model, self.modules, self.packed_modules = outer, modules, packed

    def create_dummy_lora(self, lora_id: int, *_: Any, **__: Any) -> LoRAModel:
        """An empty adapter: what our layers add in vLLM's trial runs does not depend on slots."""
        return LoRAModel(lora_id, 1, {})

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if lora_model.loras:
            super()._create_merged_loras_inplace(lora_model)


_USUAL_PARTS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Parts of packed layers for models without a table of their own (StableLM); their checkpoints
hold the parts."""


def _put_weights(model: Any) -> None:
    """Gives an empty weight to layers that have dropped theirs (int8 in the CPU build).

    vLLM's wrappers look up the device of a layer's weight.
    """
    for module in model.modules():
        if isinstance(module, LinearBase) and getattr(module, "weight", module) is None:
            module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def packed_layers(model: Any) -> dict[str, list[str]]:
    """Last name of a packed layer → the last names of its parts in a checkpoint.

    The model's own table, and the layers that its checkpoints hold in one piece (GPT-2's `c_attn`,
    BLOOM's `query_key_value`), which vLLM leaves out.
    """
    table: dict[str, list[str]] = get_packed_modules_mapping(model)
    for name, module in model.named_modules():
        if isinstance(module, QKVParallelLinear | MergedColumnParallelLinear):
            last = name.rsplit(".", 1)[-1]
            table.setdefault(last, _USUAL_PARTS.get(last, [last]))
    return table


def slices(manager: Any, stream: str) -> dict[str, Slice]:
    """The layers of a stream that adapters can change, by vLLM's names.

    A packed layer is there by its parts' names and by its own: some checkpoints hold it in one
    piece although the model's table names parts (GLM-4's `gate_up_proj`).

    Args:
        manager: of vLLM's slots.
        stream: one that owns its weights.
    """
    found = {}
    for name, layer in manager.modules.items():
        if not name.startswith(f"{stream}."):
            continue
        parts = manager.packed_modules.get(name, [name])
        sizes, into = _sizes(layer.base_layer, len(parts)), layer.base_layer.input_size
        order = _order(manager.model.get_submodule(stream), name.rsplit(".", 1)[-1])
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            found[part] = Slice((part,), (size,), into, name, sum(sizes[:i]))
        found[name] = Slice(tuple(parts), tuple(sizes), into, name, 0, order)
    return found


def by_checkpoint_name(
    model: Any, known: Mapping[str, Slice], stream: str, module: str
) -> Slice | None:
    """The slice of a module, by its name in the stream's checkpoint; None if there is none.

    Args:
        model: of the stream.
        known: from `slices`.
        stream: its name.
        module: e.g. `model.layers.0.self_attn.q_proj`.
    """
    if block_number(module) is not None:
        return known.get(f"{stream}.{module}")
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    names = mapper.get_rename_mapper().apply_list([module]) if mapper else [module]
    return known.get(f"{stream}.{names[0]}") if names else None


def adapted_layers(model: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """Stream that owns its weights → module → (out, in): see `checkpoint_layers`.

    Args:
        model: the steered model; without adapters none of its layers can be changed.
    """
    if model.lora_manager is None:
        return {}
    return {name: checkpoint_layers(model.lora_manager, name) for name in model.adapted_streams}


def checkpoint_layers(manager: Any, stream: str) -> dict[str, tuple[int, int]]:
    """Name of a module, as adapters for a stream have it → (out, in), over all ranks.

    Args:
        manager: of vLLM's slots.
        stream: one that owns its weights.
    """
    known, model = slices(manager, stream), manager.model.get_submodule(stream)
    return {
        name: (part.out, part.into)
        for own, part in known.items()
        for name in _names(model, own.removeprefix(f"{stream}."))
        if by_checkpoint_name(model, known, stream, name) is part
    }


def _names(model: Any, name: str) -> set[str]:
    """What may be called this in vLLM's model: its own names, and what it renames, if anything.

    A model's rules go from a checkpoint's names to vLLM's; where they can be turned round, they
    are. Whoever asks has to see whether a name leads back.
    """
    found = {name}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return found
    for old, new in mapper.orig_to_new_suffix.items():
        found |= {n.removesuffix(new) + old for n in found if new and n.endswith(new)}
    for old, new in mapper.orig_to_new_prefix.items():
        found |= {old + n.removeprefix(new) for n in found if new is not None and n.startswith(new)}
    for old, new in mapper.orig_to_new_substr.items():
        found |= {n.replace(new, old, 1) for n in found if new and new in n}
    return found


def fit(part: Slice, stream: str, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Whether an adapter's matrices have a layer's size: vLLM would copy smaller ones.

    Raises:
        DoesNotFit: one has not.
    """
    if (b.shape[0], a.shape[1]) != (part.out, part.into):
        raise DoesNotFit(
            "its shape does not fit the base",
            field=f"{stream}: {module}",
            value=(b.shape[0], a.shape[1]),
            allowed=f"{part.out} out, {part.into} in",
        )


def _sizes(layer: Any, parts: int) -> list[int]:
    """Output columns of each part of a layer, over all ranks."""
    if parts == 1:
        if isinstance(layer, QKVParallelLinear):
            return [sum(_qkv(layer))]
        return [int(layer.output_size)]
    return _qkv(layer) if isinstance(layer, QKVParallelLinear) else list(layer.output_sizes)


def _qkv(layer: Any) -> list[int]:
    kv = layer.total_num_kv_heads
    return [
        layer.total_num_heads * layer.head_size,
        kv * layer.head_size,
        kv * layer.v_head_size,
    ]


_INTERLEAVED = {
    "BloomForCausalLM": "query_key_value",
    "FalconForCausalLM": "query_key_value",
    "RWForCausalLM": "query_key_value",
}
"""Model class → its layer in whose checkpoints q, k and v of each head, or group of heads, lie
together. vLLM's classes sort the rows when they load them, so an adapter's are sorted alike."""


def _order(model: Any, last: str) -> torch.Tensor | None:
    """[out] which row of the checkpoint's weight each row of the layer's is."""
    if _INTERLEAVED.get(type(model).__name__) != last:
        return None
    config = model.config
    heads = config.num_attention_heads
    if type(model).__name__ == "BloomForCausalLM":
        groups, queries = heads, 1
    elif config.new_decoder_architecture:
        groups = config.num_kv_heads
        queries = heads // groups
    elif config.multi_query:
        groups, queries = 1, heads
    else:
        groups, queries = heads, 1
    size = config.hidden_size // heads
    rows = torch.arange(groups * (queries + 2) * size).view(groups, queries + 2, size)
    return torch.cat([part.reshape(-1) for part in rows.split([queries, 1, 1], dim=1)])


def check_slice(found: Slice | None, stream: str, module: str, known: Mapping[str, Slice]) -> Slice:
    """The slice, if there is one.

    Raises:
        DoesNotFit: the engine has no such layer, or cannot adapt it.
    """
    if found is not None:
        return found
    last = (name.rsplit(".", 1)[-1] for name in known)
    kinds = sorted({name for name in last if block_number(name) is None})
    why = (
        "adapters for experts are not served"
        if "expert" in module
        else ("the engine cannot adapt this layer")
    )
    raise DoesNotFit(why, field=f"{stream}: {module}", allowed=", ".join(kinds))
