"""Scales of a layer's input, moved onto the outputs of the layer before.

IA3 has them on the inputs of feed-forward layers, LoFiT on the outputs of attention heads, which
are the input of the layer behind them.

In a gated MLP the input of `down_proj` is act(gate) ⊙ up, and a factor for each of its columns is a
factor for each output of `up_proj`: exact for every activation and every weight. Elsewhere a
non-linear function, or heads that share a value, stand between the two, and we refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from adapters.errors import DoesNotFit
from adapters.formats.artefact import Artefact, Part

_DOWN, _GATE, _UP, _FUSED = "down_proj", "gate_proj", "up_proj", "gate_up_proj"

MLP = (_DOWN, _GATE, _UP, _FUSED)
"""Layers of a gated MLP."""

_FUSED_VALUES = ("qkv_proj", "c_attn")
"""Layers of attention that give queries, keys and values, in this order."""


class Linears(Protocol):
    """The linear layers of a base, by their names in its checkpoint."""

    def linear(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a layer, None if the base has no such linear layer."""


def moved(artefact: Artefact, base: Linears) -> Artefact:
    """The artefact without any `inputs`.

    Raises:
        DoesNotFit: a layer's input cannot be scaled in the layer before.
    """
    own = (part for parts in artefact.parts for part in parts.values())
    if not any(part.inputs or part.heads for part in own):
        return artefact
    return replace(artefact, parts=tuple(_moved(parts, base) for parts in artefact.parts))


def _moved(parts: dict[str, Part], base: Linears) -> dict[str, Part]:
    moved_parts = {
        m: replace(part, inputs=None, heads=None) for m, part in parts.items() if part != Part()
    }
    for module, part in parts.items():
        if part.heads is not None:
            before = _values(module, part, base)
            target = moved_parts.get(before, Part(scale=part.scale))
            moved_parts[before] = replace(target, factor=part.heads, head_size=part.head_size)
        if part.inputs is None:
            continue
        before = _before(module, base, parts)
        target = moved_parts.get(before, Part())
        moved_parts[before] = replace(target, multipliers=(*target.multipliers, part.inputs))
    return {
        module: part
        for module, part in moved_parts.items()
        if part not in (Part(), Part(scale=part.scale))
    }


def _values(module: str, part: Part, base: Linears) -> str:
    """The layer that makes the values of an attention's heads, as its last outputs.

    The heads' outputs are weighted sums of values, so a factor of an output is one of the values:
    exact, but where query heads share a value only if their factors are the same, which is looked
    at when the values are read.
    """
    parent, _, _ = module.rpartition(".")
    here = base.linear(module)
    if here is not None:
        alone = base.linear(f"{parent}.v_proj")
        if alone is not None and (
            alone[0] == here[1]
            or (part.head_size and here[1] % alone[0] == 0 and not alone[0] % part.head_size)
        ):
            return f"{parent}.v_proj"
        for name in _FUSED_VALUES:
            if base.linear(f"{parent}.{name}") == (3 * here[1], here[0]):
                return f"{parent}.{name}"
    raise DoesNotFit(
        "this adapter scales the outputs of attention heads (LoFiT's A), which is served where the "
        "values come from a v_proj, or are the last third of a fused layer's outputs",
        field=module,
    )


def _before(module: str, base: Linears, parts: Mapping[str, Part]) -> str:
    """The layer whose last outputs are the factors of a `down_proj`'s input.

    In a fused layer the second half is `up` (Phi-3, GLM-4). An engine may know it by both names;
    then the one that the adapter itself uses is taken, since no layer is changed under two.
    """
    parent, _, last = module.rpartition(".")
    here, gate, up, fused = (base.linear(f"{parent}.{name}") for name in MLP)
    if last == _DOWN and here is not None:
        halves, whole = gate == up == (here[1], here[0]), fused == (2 * here[1], here[0])
        if whole and (not halves or f"{parent}.{_FUSED}" in parts):
            return f"{parent}.{_FUSED}"
        if halves:
            return f"{parent}.{_UP}"
    raise DoesNotFit(
        "this adapter scales the input of a layer (IA3's feedforward_modules), which is served for "
        "the down_proj of gated MLPs only: elsewhere a scale does not pass through what stands "
        "before the layer; train it on the layer's output, or merge it with PEFT's "
        "merge_and_unload and serve the result as a base or a companion",
        field=module,
    )
