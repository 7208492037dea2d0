"""The description that every adapter format is read into; it holds no weights.

An artefact has *members*: one for an adapter, one per task for a MeteoRA pack. A *part* is what a
member does to one linear layer, mostly to add `scale · B A x`; or to the output of a decoder layer
(`adapters.formats.blocks`), as to a linear layer whose weight is the identity. A *gate* is the
matrix `W_gate [members, in]` that routes tokens of one layer to members; packs have one for every
layer they adapt, adapters none.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adapters.errors import BadAdapter
from adapters.formats.conditions import Condition
from adapters.where import Where

Kind = Literal[
    "lora", "dora", "adalora", "vera", "ia3", "meteora", "vector", "loreft", "conditional"
]  # fmt: skip

TEMPERATURES = (1e-6, 1e6)
"""Range of a gate's softmax temperature. Less is 0 in float32, and 0 / 0 would leave NaN in blocks
of the KV cache that other requests use later."""

LARGEST_ALPHA = sys.float_info.max
"""JSON's whole numbers go further. Whether the weights' dtype holds a scale is looked at when they
are loaded."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a tensor lies.

    Args:
        file: in the artefact's folder, relative.
        name: of the tensor.
    """

    file: str
    name: str


Gate = Place
"""Where a layer's gate [members, in] lies."""


@dataclass(frozen=True, slots=True)
class Part:
    """One member's effect on one linear layer with output t = W x + b0, before its weight:

        t + d ⊙ t + scale · outer ⊙ B diag(inner) A x + constant

    All but A and B are rare; each names the tensor that it comes from. `adapters.parts` computes
    them.

    Args:
        a: [≥ stop, in], A in its rows from `start` to `stop`; None: no product.
        b: [out, ≥ stop], B in its columns.
        start: first rank index of this member in the tensors.
        stop: last + 1.
        scale: factor of the product, alpha / r or alpha / √r.
        inner: one factor for each rank index, [r] or [r, 1] (AdaLoRA, VeRA).
        outer: one factor for each output, [out] (VeRA).
        shared: A has at least `in` columns and B at least `out` rows; the first are used (VeRA).
        magnitude: DoRA's m, [out]: d = m / ‖W + scale · B A‖ − 1, and B is scaled alike.
        multipliers: IA3's l: [out, 1], or [1, n] for the last n outputs; d = Π l − 1.
        inputs: IA3's l for the layer's input, [1, in]; `adapters.formats.inputs` moves it.
        offset: bias of B (`lora_bias`), or a steering vector, [out]; times `scale` a constant.
        bias: what takes the place of b0, [out].
        rotate: LoReFT's R as it is stored, [out, r] with orthonormal columns, for a layer whose
            weight is the identity: R (W − Rᵀ) x + R b, times `scale`. `start` is 0, `stop` r.
        source: its W, [r, out].
        source_bias: its b, [r].
        shift: what is added to the layer's input, [in]: `scale` · W shift is a constant (ITI,
            LoFiT's v).
        heads: LoFiT's A, [in]: the layer's input is multiplied by 1 + A;
            `adapters.formats.inputs` moves it.
        factor: LoFiT's A there, [out], or for the last outputs: d = A.
        head_size: of A: where query heads share a value, those of one must have the same.
    """

    a: Place | None = None
    b: Place | None = None
    start: int = 0
    stop: int = 0
    scale: float = 1.0
    inner: Place | None = None
    outer: Place | None = None
    shared: bool = False
    magnitude: Place | None = None
    multipliers: tuple[Place, ...] = ()
    inputs: Place | None = None
    offset: Place | None = None
    bias: Place | None = None
    rotate: Place | None = None
    source: Place | None = None
    source_bias: Place | None = None
    shift: Place | None = None
    heads: Place | None = None
    factor: Place | None = None
    head_size: int = 0

    @property
    def rank(self) -> int:
        """Rank of this part; 0 if it has no product."""
        return self.stop - self.start

    @property
    def constant(self) -> bool:
        """Whether it may add a constant. DoRA does if the layer has a bias."""
        added = (self.magnitude, self.offset, self.bias, self.source_bias, self.shift)
        return any(place is not None for place in added)

    @property
    def diagonal(self) -> bool:
        """Whether it multiplies the layer's output (a scale of its input: of the layer before)."""
        return any((self.magnitude, self.multipliers, self.inputs, self.heads, self.factor))

    @property
    def plain(self) -> bool:
        """Whether it is a product with a scale and nothing else."""
        return bool(self.rank) and self == Part(self.a, self.b, self.start, self.stop, self.scale)

    @property
    def places(self) -> tuple[Place, ...]:
        """Every tensor that it comes from."""
        single = (getattr(self, field) for field in _SINGLE)
        return tuple(place for place in (*single, *self.multipliers) if place is not None)

    def inside(self, folder: str) -> Part:
        """The part of an adapter that lies in a sub-folder."""

        def move(place: Place | None) -> Place | None:
            return place and Place(f"{folder}/{place.file}", place.name)

        part = replace(
            self, multipliers=tuple(Place(f"{folder}/{p.file}", p.name) for p in self.multipliers)
        )
        single: dict[str, Any] = {field: move(getattr(self, field)) for field in _SINGLE}
        return replace(part, **single)


_SINGLE = (
    "a", "b", "inner", "outer", "magnitude", "inputs", "offset", "bias", "rotate", "source",
    "source_bias", "shift", "heads", "factor",
)  # fmt: skip


@dataclass(frozen=True)
class Artefact:
    """An adapter or a MeteoRA pack on disk, read and checked.

    Args:
        folder: where it lies.
        kind: PEFT's kind (one member, no gates), `meteora`, or of what changes the residual stream.
        members: names of the members; tasks of a pack.
        parts: per member: module name, as in the base's checkpoint → part.
        gates: module name → gate; empty for all but `meteora`.
        files: the files that define it, relative, sorted.
        top_k: members that a token is routed to unless the request says otherwise; 0 without
            gates.
        temperature: T of the gate's softmax unless the request says otherwise.
        where: per member, at which positions it acts unless the request says otherwise; empty:
            at all.
        condition: when it acts there; None: always.
        invocation: ids from whose last occurrence in a prompt it acts (aLoRA); empty: it is none.
    """

    folder: Path
    kind: Kind
    members: tuple[str, ...]
    parts: tuple[dict[str, Part], ...]
    gates: dict[str, Gate]
    files: tuple[str, ...]
    top_k: int = 0
    temperature: float = 1.0
    where: tuple[Where, ...] = ()
    condition: Condition | None = None
    invocation: tuple[int, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Per member, its largest rank over all layers; 0 if it has no products."""
        return tuple(max((p.rank for p in parts.values()), default=0) for parts in self.parts)

    @property
    def constants(self) -> tuple[bool, ...]:
        """Per member, whether any part adds a constant; empty if none does."""
        flags = tuple(any(p.constant for p in parts.values()) for parts in self.parts)
        return flags if any(flags) else ()

    @property
    def diagonals(self) -> tuple[bool, ...]:
        """Per member, whether any part multiplies the output; empty if none does."""
        flags = tuple(any(p.diagonal for p in parts.values()) for parts in self.parts)
        return flags if any(flags) else ()

    @property
    def by_values(self) -> bool:
        """Whether it scales attention heads by their values, which later positions read."""
        return any(part.heads is not None for parts in self.parts for part in parts.values())

    @property
    def plain(self) -> bool:
        """Whether all parts are products with scales and nothing else."""
        return all(part.plain for parts in self.parts for part in parts.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all layers that some member changes, sorted."""
        return tuple(sorted({module for parts in self.parts for module in parts}))

    @property
    def compared(self) -> tuple[tuple[str, Place], ...]:
        """(layer, vector) of each of its conditions."""
        found = self.condition.comparisons if self.condition else ()
        return tuple((one.module, Place(one.file, one.name)) for one in found)

    def digest(self) -> str:
        """SHA-256 over the defining files' names and bytes, 64 hex digits; reads them all."""
        total = hashlib.sha256()
        for name in self.files:
            with (self.folder / name).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            total.update(hashlib.sha256(name.encode()).digest() + content)
        return total.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """A regular file of the folder.

    Raises:
        BadAdapter: it is missing, or it leads out of the folder.
    """
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadAdapter("leads out of the adapter's folder", field=name)
        there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names too long
        why = getattr(error, "strerror", None) or type(error).__name__
        raise BadAdapter(f"not a file's name: {why}", field=name) from error
    if not there:
        raise BadAdapter("the file is missing", field=name)
    return path
