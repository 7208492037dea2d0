"""Reads an adapter's folder, and checks it against the base it shall change."""

from __future__ import annotations

from math import prod
from pathlib import Path

from adapters.errors import BadAdapter, DoesNotFit
from adapters.formats import meteora, peft, vectors
from adapters.formats.artefact import Artefact, Part, Place
from adapters.formats.base import TABLES, BaseShapes
from adapters.formats.blocks import block_number
from adapters.formats.features import also_changes
from adapters.formats.header import TensorInfo, check_finite, read_header
from adapters.formats.inputs import MLP, moved

Headers = dict[str, dict[str, TensorInfo]]
"""File → its tensors by name."""


def read_artefact(folder: Path) -> Artefact:
    """The artefact in a folder, of whichever format; headers only, no value is read.

    Raises:
        BadAdapter: it is no adapter that can be served.
    """
    if (folder / meteora.CONFIG).is_file():
        return meteora.read_meteora(folder)
    if (folder / peft.CONFIG).is_file():
        return peft.read_peft(folder)
    if vectors.present(folder):
        return vectors.read_vectors(folder)
    allowed = (
        f"{peft.CONFIG}, {meteora.CONFIG}, {vectors.CONFIG}, {vectors.TENSORS}, {vectors.GGUF}"
    )
    raise BadAdapter("no adapter here", field=folder.name, allowed=allowed)


def inspect(folder: Path, base: BaseShapes, *, max_rank: int, values: bool = True) -> Artefact:
    """The artefact in a folder, fit to serve on a base.

    Args:
        folder: its own.
        base: the model that it shall change.
        max_rank: rank indices that one set of adapters may take in this server; an adapter takes
            its rank, one more for what it adds and one more for what it multiplies; a pack the sum
            of its members' and one more for each member's gate.
        values: whether every value is read once; false: headers only, for files with a digest whose
            values were read before.

    Raises:
        BadAdapter: it is no adapter that can be served, or a value is not finite.
        DoesNotFit: a tensor does not fit the base, or the rank does not fit the server.
    """
    artefact = read_artefact(folder)
    width = (
        sum(artefact.ranks) + sum(artefact.constants) + sum(artefact.diagonals)
        + (len(artefact.members) if artefact.gates else 0)
    )  # fmt: skip
    if width > max_rank:
        raise DoesNotFit("needs too many rank indices", field="rank", value=width,
                         allowed=f"≤ {max_rank}")  # fmt: skip
    headers = {name: read_header(folder / name) for name in _tensor_files(artefact)}
    settled = moved(artefact, base)
    _check_before(artefact, base)
    for parts in settled.parts:
        for module, part in parts.items():
            _check_part(part, module, headers, base)
    for module, place in artefact.compared:
        if (size := _linear(base, module, place.file)) is not None:
            _expect(place, headers[place.file][place.name].shape, (size[1],))
    for module, gate in artefact.gates.items():
        size = _linear(base, module, gate.file)
        if size is not None:
            _expect(gate, headers[gate.file][gate.name].shape, (len(artefact.members), size[1]))
    if meteora.RELEASED in headers:
        _check_base_copy(meteora.base_copy(folder), base)
    for place in sorted(_tensors(artefact)) if values else ():
        check_finite(folder / place.file, place.name, headers[place.file][place.name])
    return artefact


def elements(artefact: Artefact) -> int:
    """Numbers that an engine holds of an artefact; reads headers."""
    headers = {name: read_header(artefact.folder / name) for name in _tensor_files(artefact)}
    whole = [*artefact.gates.values(), *(place for _, place in artefact.compared)]
    total = sum(prod(headers[place.file][place.name].shape) for place in whole)
    for part in (part for parts in artefact.parts for part in parts.values()):
        for place in part.places:
            shape = headers[place.file][place.name].shape
            if place == part.a or place == part.b:  # VeRA's are shared on disk only
                total += part.rank * shape[place == part.a]
            elif place != part.inner:
                total += prod(shape)
    return total


def _tensors(artefact: Artefact) -> set[Place]:
    """Everything that is served."""
    places = {place for parts in artefact.parts for part in parts.values() for place in part.places}
    return places | set(artefact.gates.values()) | {place for _, place in artefact.compared}


def _tensor_files(artefact: Artefact) -> set[str]:
    return {place.file for place in _tensors(artefact)}


def _check_before(artefact: Artefact, base: BaseShapes) -> None:
    """Raises if anything but its three layers stands in an MLP whose inputs are scaled (BitNet has
    a norm there).
    """
    parents = {
        m.rpartition(".")[0] for parts in artefact.parts for m, p in parts.items() if p.inputs
    }
    for name in base.tensors if parents else ():
        parent, _, rest = name.rpartition(".")[0].rpartition(".")
        if parent in parents and rest not in MLP:
            raise DoesNotFit("this adapter scales the input of a layer (IA3's feedforward_modules) "
                             "that does not follow the gate directly; merge it with PEFT's "
                             "merge_and_unload and serve the result as a base or a companion",
                             field=name)  # fmt: skip


def _check_part(part: Part, module: str, headers: Headers, base: BaseShapes) -> None:
    """Raises if a tensor of a part does not fit its layer."""
    size = _linear(base, module, part.places[0].file)
    if size is None:
        return
    out, into = size

    def shape(place: Place) -> tuple[int, ...]:
        return headers[place.file][place.name].shape

    if part.a is not None and part.b is not None:
        a, b = shape(part.a), shape(part.b)
        wide = part.shared and a[1] >= into and b[0] >= out
        _expect(part.a, a, (a[0], a[1] if wide else into))
        _expect(part.b, b, (b[0] if wide else out, b[1]))
    r = part.rank
    for place, want in (
        (part.outer, (out,)), (part.magnitude, (out,)), (part.offset, (out,)), (part.bias, (out,)),
        (part.rotate, (out, r)), (part.source, (r, into)), (part.source_bias, (r,)),
        (part.shift, (into,)),
    ):  # fmt: skip
        if place is not None:
            _expect(place, shape(place), want)
    if part.factor is not None:
        own = shape(part.factor)
        if len(own) != 1 or (own[0] % out and 3 * own[0] != out):
            _expect(part.factor, own, (out,))
    biases_known = base.layers is None or f"{module}.weight" in base.tensors
    if part.bias is not None and biases_known and base.tensors.get(f"{module}.bias") != (out,):
        raise DoesNotFit("the adapter changes a bias that the base's layer lacks",
                         field=f"{part.bias.file}: {part.bias.name}")  # fmt: skip
    for place in part.multipliers:
        if shape(place)[1] == 1:
            _expect(place, shape(place), (out, 1))
        elif shape(place)[1] not in (out, out // 2):
            _expect(place, shape(place), (1, out))


def _linear(base: BaseShapes, module: str, file: str) -> tuple[int, int] | None:
    """(out, in) of a layer; None: nothing is known of it yet."""
    field, last = f"{file}: {module}", module.rsplit(".", 1)[-1]
    if (number := block_number(module)) is not None and not base.vectors:
        raise DoesNotFit("this server takes no adapters that add to the outputs of decoder layers, "
                         "as this one does: set adapters.vectors to true and start it again",
                         field=f"{file}: layer", value=number)  # fmt: skip
    shape = base.linear(module)
    if shape is not None or not base.whole:
        return shape
    if number is not None:
        raise DoesNotFit("this server's base has no decoder layer of this number whose output "
                         "adapters can change", field=f"{file}: layer", value=number,
                         allowed=_blocks(base))  # fmt: skip
    if last in TABLES:
        raise DoesNotFit(also_changes(module, "target_modules"), field=field)
    if len(base.tensors.get(f"{module}.weight", ())) == 1:
        raise DoesNotFit(
            f"this adapter also changes the norm {module}, which acts before a layer's product; "
            'train it with bias="lora_only", or merge it with PEFT\'s merge_and_unload and serve '
            "the result as a base or a companion",
            field=field,
        )
    why = "the base has no such linear layer"
    if "experts" in module:
        why = "this adapter changes the experts of a mixture, which is not served"
    raise DoesNotFit(why, field=field, allowed=base.offers(module))


def _blocks(base: BaseShapes) -> str:
    numbers = sorted(n for m in base.layers or () if (n := block_number(m)) is not None)
    if numbers:
        return f"{numbers[0]} to {numbers[-1]}"
    return "none: the layers of this base's family are not known"


def _expect(place: Place, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    if shape != want:
        raise DoesNotFit(
            "its shape does not fit the base",
            field=f"{place.file}: {place.name}",
            value=shape,
            allowed=str(want),
        )


def _check_base_copy(copy: dict[str, TensorInfo], base: BaseShapes) -> None:
    """The copy of the base inside a released file tells whether it was made for this base."""
    for name, info in copy.items():
        tied = info.shape if name == "lm_head.weight" else None
        shape = base.linear(name.removesuffix(".weight")) or base.tensors.get(name, tied)
        # Without all of its tensors, those of which nothing is known tell nothing.
        if shape != info.shape and (shape is not None or (base.layers is None and base.whole)):
            raise DoesNotFit(
                "its copy of the base is of another model",
                field=f"{meteora.RELEASED}: {name}",
                value=info.shape,
                allowed=str(shape),
            )
