"""The weights of one part: what a member does to one layer, in the terms of the adapter sum.

    y = t + g ( d ⊙ t + B A x + b )        t = W x + b0, what the layer gives without the adapter

g is the request's weight times the gate. At g = 1 this is what PEFT computes; for other weights,
and for sums over several adapters, it is the definition. Formulas as in peft 0.21.2 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from adapters.errors import BadAdapter, DoesNotFit
from adapters.formats.artefact import Part, Place
from adapters.formats.blocks import block_number
from adapters.formats.inputs import Linears
from adapters.tensors import TensorFile

_CANCELLED = 1e-4
"""Share of a row's squared norms that W and scale · B A must leave of each other. With less, a norm
from products in float32 would be wrong by more than 1e-3."""

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
        base: asked only by kinds that need to know the base: DoRA, biases, VeRA, IA3, and what is
            done to attention heads.

    Raises:
        BadAdapter: DoRA's product cancels a row of the base; or the output of a decoder layer, of
            which the engine has two parts, is to be multiplied.
        DoesNotFit: the base lacks the layer, or its bias; or heads share a value and are to be
            scaled differently.
    """
    if part.diagonal and block_number(module) is not None:
        raise BadAdapter("the output of a decoder layer can be added to, not scaled", field=module)
    a, b = _reft(part, read) if part.rotate is not None else _product(part, module, read, base)
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
    if part.factor is not None:
        factor = _scaled_heads(part, module, read, base)
        diagonal = factor if diagonal is None else diagonal + factor
    for added in _constants(part, module, read, base):
        constant = added if constant is None else constant + added
    return LoadedPart(a, b, constant, diagonal)


def _constants(part: Part, module: str, read: Read, base: BaseLayers) -> Iterator[torch.Tensor]:
    """[out] what a part adds besides its bias, whatever the input."""
    if part.offset is not None:
        yield part.scale * read(part.offset).float()
    if part.source_bias is not None:
        assert part.rotate is not None
        turned = read(part.rotate).double() @ read(part.source_bias).double()
        yield (part.scale * turned).float()
    if part.shift is not None:
        yield part.scale * base.product(module, read(part.shift).float()[None])[0]


def _reft(part: Part, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """LoReFT's A = W − Rᵀ and B = R, by R as it is stored (arXiv 2404.03592, eq. 2)."""
    assert part.rotate is not None and part.source is not None
    rotate = read(part.rotate).double()
    a = read(part.source).double() - rotate.T
    return a.float(), (part.scale * rotate).float()


def _scaled_heads(part: Part, module: str, read: Read, base: BaseLayers) -> torch.Tensor:
    """[out] LoFiT's A (arXiv 2406.01563), by what each value is multiplied more than once.

    Raises:
        DoesNotFit: query heads that share a value are to be scaled differently.
    """
    assert part.factor is not None
    out, own = _shape(module, base)[0], read(part.factor).float().flatten()
    if len(own) > out:
        shared = own.view(out // part.head_size, -1, part.head_size)
        if not torch.equal(shared, shared[:, :1].expand_as(shared)):
            raise DoesNotFit(
                "scales heads differently that share keys and values in this base, which has no "
                "place for that", field=f"{part.factor.file}: {part.factor.name}",
            )  # fmt: skip
        own = shared[:, 0].flatten()
    found = torch.zeros(out)
    found[out - len(own) :] = own
    return part.scale * found


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
