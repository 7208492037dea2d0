"""The weights of one part: what a member does to one layer, in the terms of the adapter sum.

    y = t + g ( d ⊙ t + B A x + b )        t = W x + b0, what the layer gives without the adapter

g is the request's weight times the gate. At g = 1 this is what PEFT computes; for other weights,
and for sums over several adapters, it is the definition. Formulas as in peft 0.21.2 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from adapters.errors import BadAdapter, DoesNotFit
from adapters.formats.artefact import Part, Place
from adapters.formats.inputs import Linears
from adapters.tensors import TensorFile

_CANCELLED = 1e-4
"""Of a row's squared norms: what W and scale · B A must leave of each other. With less, a norm from
products in float32 would be wrong by more than 1e-3."""

Read = Callable[[Place], torch.Tensor]
"""The tensor of a place, as it is on disk."""


class BaseLayers(Linears, Protocol):
    """The base's own linear layers, by their names in its checkpoint; none of them adapted."""

    def product(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """X Wᵀ without the bias, [n, out] float32, for x [n, in] float32."""

    def row_norms(self, module: str) -> torch.Tensor:
        """‖W‖₂ of each row, not squared, [out] float32."""

    def bias(self, module: str) -> torch.Tensor | None:
        """b0, [out] float32; None if the layer has none."""


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """One part in float32; None where there is nothing.

    Args:
        a: A, [r, in].
        b: B with the scale in it, [out, r].
        constant: b, [out].
        diagonal: d, [out].
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None


def load_part(part: Part, module: str, read: Read, base: BaseLayers) -> LoadedPart:
    """The weights of a part whose `inputs` are moved.

    Args:
        part: it.
        module: the layer.
        read: reads its tensors.
        base: asked only by kinds that need to know the base: DoRA, biases, VeRA, IA3.

    Raises:
        BadAdapter: DoRA's product cancels a row of the base.
        DoesNotFit: the base lacks the layer, or its bias.
    """
    a, b = _product(part, module, read, base)
    constant = diagonal = None
    if part.bias is not None:
        constant = read(part.bias).float() - _bias(module, base)
    if part.magnitude is not None:
        assert a is not None and b is not None
        factor = read(part.magnitude).float() / _norms(a, b, module, base)
        diagonal, b = factor - 1, factor[:, None] * b
        if (bias := base.bias(module)) is not None:  # PEFT does not scale it
            constant = -diagonal * bias if constant is None else constant - diagonal * bias
    if part.multipliers:
        factor = _multiplier(part, module, read, base)
        diagonal = factor - 1
        constant = None if constant is None else factor * constant
    if part.offset is not None:
        offset = part.scale * read(part.offset).float()
        constant = offset if constant is None else constant + offset
    return LoadedPart(a, b, constant, diagonal)


def factors(folder: Path, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a plain part, without the scale and as they are on disk.

    Args:
        folder: of the artefact.
        part: it.
    """
    assert part.a is not None and part.b is not None
    a, b = (TensorFile(folder / place.file)[place.name] for place in (part.a, part.b))
    return a[part.start : part.stop], b[:, part.start : part.stop]


def _product(
    part: Part, module: str, read: Read, base: BaseLayers
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if part.a is None or part.b is None:
        return None, None
    a = read(part.a)[part.start : part.stop].float()
    b = part.scale * read(part.b)[:, part.start : part.stop].float()
    if part.shared:
        out, into = _shape(module, base)
        a, b = a[:, :into], b[:out]
    if part.inner is not None:
        b = b * read(part.inner).float().reshape(1, -1)
    if part.outer is not None:
        b = b * read(part.outer).float()[:, None]
    return a, b


def _norms(a: torch.Tensor, b: torch.Tensor, module: str, base: BaseLayers) -> torch.Tensor:
    """‖W + B A‖₂ of each row, from products alone, so that W may be packed or quantised.

    ‖w + v‖² = ‖w‖² + 2 w·v + ‖v‖², for the row v = b A with a row b of B.
    """
    base_squared = base.row_norms(module).double().square()
    across = (b.double() * base.product(module, a).double().T).sum(1)
    wide = a.double()
    added = ((b.double() @ (wide @ wide.T)) * b.double()).sum(1)
    total = base_squared + 2 * across + added
    if (total <= _CANCELLED * (base_squared + added)).any():
        raise BadAdapter(
            "DoRA's product cancels a row of the base's weight, or the row is 0, so that its norm "
            "is not known well enough",
            field=module,
        )
    return total.sqrt().float()


def _multiplier(part: Part, module: str, read: Read, base: BaseLayers) -> torch.Tensor:
    """Π l; one that is shorter than the outputs is for the last of them."""
    factor = torch.ones(_shape(module, base)[0])
    for place in part.multipliers:
        vector = read(place).float().flatten()
        factor[len(factor) - len(vector) :] *= vector
    return factor


def _shape(module: str, base: BaseLayers) -> tuple[int, int]:
    shape = base.linear(module)
    if shape is None:
        raise DoesNotFit("the base has no such linear layer", field=module)
    return shape


def _bias(module: str, base: BaseLayers) -> torch.Tensor:
    bias = base.bias(module)
    if bias is None:
        raise DoesNotFit("the adapter changes a bias that the base's layer lacks", field=module)
    return bias
