"""Reads an adapter's folder, and checks it against the base it shall change."""

from __future__ import annotations

from math import prod
from pathlib import Path

from adapters.errors import BadAdapter, DoesNotFit
from adapters.formats import meteora, peft
from adapters.formats.artefact import Artefact
from adapters.formats.base import BaseShapes
from adapters.formats.header import TensorInfo, check_finite, read_header


def read_artefact(folder: Path) -> Artefact:
    """The artefact in a folder, of whichever format; headers only, no value is read.

    Raises:
        BadAdapter: it is no adapter that can be served.
    """
    if (folder / meteora.CONFIG).is_file():
        return meteora.read_meteora(folder)
    if (folder / peft.CONFIG).is_file():
        return peft.read_peft(folder)
    raise BadAdapter(
        "no adapter here", field=folder.name, allowed=f"{peft.CONFIG} or {meteora.CONFIG}"
    )


def inspect(folder: Path, base: BaseShapes, *, max_rank: int) -> Artefact:
    """The artefact in a folder, fit to serve on a base; every value has been read once.

    Args:
        folder: its own.
        base: the model that it shall change.
        max_rank: rank indices that one set of adapters may take in this server; a pack takes
            the sum of its members' ranks and one more for each member's gate.

    Raises:
        BadAdapter: it is no adapter that can be served, or a value is not finite.
        DoesNotFit: a tensor does not fit the base, or the rank does not fit the server.
    """
    found = read_artefact(folder)
    width = sum(found.ranks) + (len(found.members) if found.gates else 0)
    if width > max_rank:
        raise DoesNotFit("needs too many rank indices", field="rank", value=width,
                         allowed=f"≤ {max_rank}")  # fmt: skip
    headers = {name: read_header(folder / name) for name in _tensor_files(found)}
    for parts in found.parts:
        for module, part in parts.items():
            size = _linear(base, module, part.file)
            if size is None:
                continue
            out, into = size
            a, b = headers[part.file][part.a].shape, headers[part.file][part.b].shape
            _expect(part.file, part.a, a, (a[0], into))
            _expect(part.file, part.b, b, (out, b[1]))
    for module, gate in found.gates.items():
        size = _linear(base, module, gate.file)
        if size is not None:
            shape = headers[gate.file][gate.name].shape
            _expect(gate.file, gate.name, shape, (len(found.members), size[1]))
    if meteora.RELEASED in headers:
        _check_base_copy(meteora.base_copy(folder), base)
    for file, name in sorted(_tensors(found)):
        check_finite(folder / file, name, headers[file][name])
    return found


def elements(found: Artefact) -> int:
    """Numbers in everything that is served; reads headers."""
    headers = {name: read_header(found.folder / name) for name in _tensor_files(found)}
    return sum(prod(headers[file][name].shape) for file, name in _tensors(found))


def _tensors(found: Artefact) -> set[tuple[str, str]]:
    """(file, tensor) of everything that is served."""
    halves = {(p.file, t) for parts in found.parts for p in parts.values() for t in (p.a, p.b)}
    return halves | {(gate.file, gate.name) for gate in found.gates.values()}


def _tensor_files(found: Artefact) -> set[str]:
    return {file for file, _ in _tensors(found)}


def _linear(base: BaseShapes, module: str, file: str) -> tuple[int, int] | None:
    """(out, in) of a layer; None: nothing is known of it yet."""
    shape = base.linear(module)
    if shape is None and base.whole:
        last = module.rsplit(".", 1)[-1]
        why = next((text for name, text in _SPECIAL.items() if name in (last, "experts")
                    and name in module), "the base has no such linear layer")  # fmt: skip
        raise DoesNotFit(why, field=f"{file}: {module}", allowed=base.offers(module))
    return shape


_SPECIAL = {
    "lm_head": "this adapter also changes lm_head, the output layer, which is not served",
    "embed_out": "this adapter also changes embed_out, the output layer, which is not served",
    "embed_tokens": "this adapter also changes embed_tokens, the input embeddings, which are not "
    "served",
    "wte": "this adapter also changes wte, the input embeddings, which are not served",
    "experts": "this adapter changes the experts of a mixture, which is not served",
}
"""Last name of a module, or `experts` anywhere in it → why an adapter for it is refused."""


def _expect(file: str, name: str, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    if shape != want:
        raise DoesNotFit(
            "its shape does not fit the base",
            field=f"{file}: {name}",
            value=shape,
            allowed=str(want),
        )


def _check_base_copy(copy: dict[str, TensorInfo], base: BaseShapes) -> None:
    """The copy of the base inside a released file tells whether it was made for this base."""
    for name, info in copy.items():
        tied = info.shape if name == "lm_head.weight" else None
        known = base.linear(name.removesuffix(".weight")) or base.tensors.get(name, tied)
        # Without all of its tensors, those of which nothing is known tell nothing.
        if known != info.shape and (known is not None or (base.layers is None and base.whole)):
            raise DoesNotFit(
                "its copy of the base is of another model",
                field=f"{meteora.RELEASED}: {name}",
                value=info.shape,
                allowed=str(known),
            )
