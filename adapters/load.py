"""Loads the weights of a set's artefacts, stacked along the rank. Runs where torch is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from adapters.errors import AdapterError, BadAdapter, FilesLost
from adapters.formats.artefact import Artefact
from adapters.formats.inspect import read_artefact
from adapters.sets import AdapterSet, Block, Member
from adapters.tensors import TensorFile

Stacked = tuple[torch.Tensor, torch.Tensor]
"""A [R + G, in] with the gates' rows, and B [out, R] with each part's scale in it."""


def load_set(
    found: AdapterSet, owner: str, dtype: torch.dtype, *, by_columns: bool = False
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, A, B) of every layer of `owner` that the set changes.

    Args:
        found: the set.
        owner: one of its models.
        dtype: of the tensors that come out; scales are multiplied in float32.
        by_columns: whether B lies in memory column by column.

    Yields:
        The module's name as in the owner's checkpoint, A [R + G, in] and B [out, R].

    Raises:
        BadAdapter: a file is missing or broken, is not what the set says, or has values that
            `dtype` cannot hold.
    """
    layout = found.layout(owner)
    members = [m for m in found.members if m.owner == owner]
    artefacts = [_read(member) for member in members]
    files = [
        {
            name: TensorFile(artefact.folder / name)
            for name in artefact.files
            if name.endswith(".safetensors")
        }
        for artefact in artefacts
    ]
    for module in sorted({m for artefact in artefacts for m in artefact.modules}):
        a = b = torch.zeros(0)
        for artefact, block, opened in zip(artefacts, layout.blocks, files, strict=True):
            for rows, columns, part_a, part_b in _parts(artefact, block, module, opened):
                if not a.numel():
                    a = torch.zeros(layout.rows, part_a.shape[1], dtype=dtype)
                a[rows] = part_a.to(dtype)
                if part_b is not None:
                    if not b.numel():
                        out = part_b.shape[0]
                        shape = (layout.columns, out) if by_columns else (out, layout.columns)
                        b = torch.zeros(shape, dtype=dtype)
                        b = b.T if by_columns else b
                    b[:, columns] = part_b.to(dtype)
        # Infinite values would leave NaN in KV blocks that other requests read later.
        if not (_finite(a) and _finite(b)):
            name = str(dtype).removeprefix("torch.")
            raise BadAdapter(f"values too large for {name}", field=module)
        yield module, a, b


def verify(member: Member) -> None:
    """Reads all files of a set's member.

    Raises:
        FilesLost: they are not what its digest says.
    """
    try:
        right = read_artefact(Path(member.folder)).digest() == member.digest
    except (AdapterError, OSError) as error:
        raise FilesLost(f"the files cannot be read: {error}", field=member.folder) from error
    if not right:
        raise FilesLost("the files have changed since they were checked", field=member.folder)


def _finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN: the extremes tell, 20 times as fast as `isfinite`."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def _read(member: Member) -> Artefact:
    artefact = read_artefact(Path(member.folder))
    if artefact.ranks != member.ranks or bool(artefact.gates) != member.routed:
        raise FilesLost("the files have changed since they were checked", field=member.folder)
    return artefact


def _parts(
    artefact: Artefact, block: Block, module: str, files: dict[str, TensorFile]
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor | None]]:
    """(rows of A, columns of B, A, scaled B or None for a gate) of one artefact in one layer."""
    start = block.start
    for rank, parts in zip(block.ranks, artefact.parts, strict=True):
        if part := parts.get(module):
            place = slice(start, start + part.rank)
            file = files[part.file]
            a = file[part.a][part.start : part.stop]
            b = file[part.b][:, part.start : part.stop]
            yield place, place, a, b.float() * part.scale
        start += rank
    if block.gate is not None and module in artefact.gates:
        gate = artefact.gates[module]
        rows = slice(block.gate, block.gate + len(artefact.members))
        yield rows, slice(0, 0), files[gate.file][gate.name], None
