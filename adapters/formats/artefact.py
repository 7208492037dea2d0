"""What every adapter format is read into: one description, without any weights.

An artefact has *members*: one for a LoRA adapter, one per task for a MeteoRA pack. A *part* is what
a member adds to one linear layer: `scale · B A`. A *gate* is the matrix `W_gate [members, in]` that
routes tokens of one layer to members; packs have one for every layer they adapt, adapters none.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.errors import BadAdapter

TEMPERATURES = (1e-6, 1e6)
"""Of a gate's softmax. Less is 0 in float32, and 0 / 0 would leave NaN in blocks of the key-value
cache that other requests use later."""

LARGEST_ALPHA = sys.float_info.max
"""JSON's whole numbers go further. Whether the weights' dtype holds a scale is looked at when they
are loaded."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one member adds to one linear layer: `scale · B[:, start:stop] A[start:stop]`.

    Args:
        file: file in the artefact's folder, relative.
        a: name of the tensor [≥ stop, in].
        b: name of the tensor [out, ≥ stop].
        start: first rank index of this member in the tensors.
        stop: last + 1.
        scale: factor of the product, alpha / r or alpha / √r.
    """

    file: str
    a: str
    b: str
    start: int
    stop: int
    scale: float

    @property
    def rank(self) -> int:
        """Rank of this part."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Gate:
    """Where a layer's gate [members, in] lies.

    Args:
        file: file in the artefact's folder, relative.
        name: name of the tensor.
    """

    file: str
    name: str


@dataclass(frozen=True)
class Artefact:
    """A LoRA adapter or a MeteoRA pack on disk, read and checked.

    Args:
        folder: where it lies.
        kind: `lora` (one member, no gates) or `meteora`.
        members: names of the members; tasks of a pack.
        parts: per member: module name, as in the base's checkpoint → part.
        gates: module name → gate; empty for `lora`.
        files: the files that define it, relative, sorted.
        top_k: members that a token is routed to unless the request says otherwise; 0 for `lora`.
        temperature: T of the gate's softmax unless the request says otherwise.
    """

    folder: Path
    kind: Literal["lora", "meteora"]
    members: tuple[str, ...]
    parts: tuple[dict[str, Part], ...]
    gates: dict[str, Gate]
    files: tuple[str, ...]
    top_k: int = 0
    temperature: float = 1.0

    @property
    def ranks(self) -> tuple[int, ...]:
        """Per member, its largest rank over all layers."""
        return tuple(max(part.rank for part in parts.values()) for parts in self.parts)

    @property
    def constants(self) -> tuple[bool, ...]:
        """Per member, whether any part adds a constant; empty if none does."""
        return ()

    @property
    def diagonals(self) -> tuple[bool, ...]:
        """Per member, whether any part multiplies the output; empty if none does."""
        return ()

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
