"""What every adapter format is read into: one description, without any weights.

An artefact has *members*: one for an adapter, one per task for a MeteoRA pack. A *part* is what a
member does to one linear layer, mostly to add `scale · B A x`. A *gate* is the matrix `W_gate
[members, in]` that routes tokens of one layer to members; packs have one for every layer they
adapt, adapters none.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adapters.errors import BadAdapter

Kind = Literal["lora", "dora", "adalora", "vera", "ia3", "meteora"]

TEMPERATURES = (1e-6, 1e6)
"""Of a gate's softmax. Less is 0 in float32, and 0 / 0 would leave NaN in blocks of the key-value
cache that other requests use later."""

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
    """What one member does to one linear layer with output t = W x + b0, before its weight:

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
        offset: bias of B, [out], times `scale` a constant (`lora_bias`).
        bias: what takes the place of b0, [out].
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

    @property
    def rank(self) -> int:
        """Rank of this part; 0 if it has no product."""
        return self.stop - self.start

    @property
    def constant(self) -> bool:
        """Whether it may add a constant. DoRA does if the layer has a bias."""
        return any((self.magnitude, self.offset, self.bias))

    @property
    def diagonal(self) -> bool:
        """Whether it multiplies the layer's output (IA3's input scale: of the layer before)."""
        return any((self.magnitude, self.multipliers, self.inputs))

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


_SINGLE = ("a", "b", "inner", "outer", "magnitude", "inputs", "offset", "bias")


@dataclass(frozen=True)
class Artefact:
    """An adapter or a MeteoRA pack on disk, read and checked.

    Args:
        folder: where it lies.
        kind: PEFT's kind (one member, no gates) or `meteora`.
        members: names of the members; tasks of a pack.
        parts: per member: module name, as in the base's checkpoint → part.
        gates: module name → gate; empty for all but `meteora`.
        files: the files that define it, relative, sorted.
        top_k: members that a token is routed to unless the request says otherwise; 0 without
            gates.
        temperature: T of the gate's softmax unless the request says otherwise.
    """

    folder: Path
    kind: Kind
    members: tuple[str, ...]
    parts: tuple[dict[str, Part], ...]
    gates: dict[str, Gate]
    files: tuple[str, ...]
    top_k: int = 0
    temperature: float = 1.0

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
    def plain(self) -> bool:
        """Whether all parts are products with scales and nothing else."""
        return all(part.plain for parts in self.parts for part in parts.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all layers that some member changes, sorted."""
        return tuple(sorted({module for parts in self.parts for module in parts}))

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
