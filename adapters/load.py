"""Loads the weights of a set's artefacts, stacked along the rank. Runs where torch is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from adapters.errors import AdapterError, BadAdapter, DoesNotFit, FilesLost
from adapters.formats.artefact import Artefact, Place
from adapters.formats.blocks import block_number
from adapters.formats.inputs import moved
from adapters.formats.inspect import read_artefact
from adapters.kernels.judging import LoadedCondition, Threshold
from adapters.parts import BaseLayers, Read, load_part
from adapters.sets import AdapterSet, Block, Member
from adapters.tensors import TensorFile


def load_set(
    adapter_set: AdapterSet,
    owner: str,
    dtype: torch.dtype,
    base: BaseLayers,
    *,
    by_columns: bool = False,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, A, B) of every layer of `owner` that the set changes.

    Args:
        adapter_set: its members are loaded from their folders.
        owner: one of its models.
        dtype: of the tensors that come out; all else is computed in float32.
        base: the owner's own layers.
        by_columns: whether B lies in memory column by column.

    Yields:
        The module's name as in the owner's checkpoint, A [R + G, in] and B [out, R].

    Raises:
        BadAdapter: a file is missing or broken, is not what the set says, or has values that
            `dtype` cannot hold.
        DoesNotFit: the base lacks a layer, or a bias of one.
    """
    layout = adapter_set.layout(owner)
    members = [m for m in adapter_set.members if m.owner == owner]
    artefacts = [moved(_read(member), base) for member in members]
    opened = [_Opened(artefact) for artefact in artefacts]
    for module in sorted({m for artefact in artefacts for m in artefact.modules}):
        shape = base.linear(module)
        if shape is None:
            raise DoesNotFit("the base has no such linear layer", field=f"{owner}: {module}")
        out, into = shape
        a = torch.zeros(layout.rows, into, dtype=dtype)
        b = torch.zeros(layout.columns, out, dtype=dtype).T if by_columns else torch.zeros(
            out, layout.columns, dtype=dtype)  # fmt: skip
        for artefact, block, read in zip(artefacts, layout.blocks, opened, strict=True):
            _fill(a, b, artefact, block, module, read, base)
        # Infinite values would leave NaN in KV blocks that other requests read later.
        if not (_finite(a) and _finite(b)):
            name = str(dtype).removeprefix("torch.")
            raise BadAdapter(f"values too large for {name}", field=module)
        yield module, a, b


def normed(adapter_set: AdapterSet, owner: str) -> list[str]:
    """The layers of `owner` whose row norms `load_set` asks its base for."""
    members = [_read(m) for m in adapter_set.members if m.owner == owner and any(m.diagonals)]
    parts = (part for artefact in members for layers in artefact.parts for part in layers.items())
    return sorted({module for module, part in parts if part.magnitude is not None})


def conditional(adapter_set: AdapterSet) -> bool:
    """Whether any of its artefacts acts under a condition."""
    return any(_read(member).condition is not None for member in adapter_set.members)


def load_conditions(
    adapter_set: AdapterSet, device: torch.device
) -> dict[str, dict[str, LoadedCondition]]:
    """Owner → digest → when that artefact acts, of those that have conditions.

    Args:
        adapter_set: its members are loaded from their folders.
        device: of the vectors.

    Raises:
        BadAdapter: as `load_set`.
    """
    found: dict[str, dict[str, LoadedCondition]] = {}
    for member in adapter_set.members:
        artefact = _read(member)
        if (condition := artefact.condition) is None:
            continue
        read = _Opened(artefact)
        thresholds = tuple(
            Threshold(
                block_number(one.module) or 0,
                read(Place(one.file, one.name)).float().to(device),
                one.threshold,
                one.above,
            )
            for one in condition.comparisons
        )
        found.setdefault(member.owner, {})[member.digest] = LoadedCondition(
            condition.gate == "prompt",
            condition.read == "mean",
            condition.similarity == "projected",
            thresholds,
        )
    return found


class _Opened:
    """The tensors of an artefact.

    Args:
        artefact: its files are mapped into memory.
    """

    def __init__(self, artefact: Artefact) -> None:
        names = [name for name in artefact.files if name.endswith((".safetensors", ".gguf"))]
        self._files = {name: TensorFile(artefact.folder / name) for name in names}

    def __call__(self, place: Place) -> torch.Tensor:
        """One of them, as it is on disk."""
        return self._files[place.file][place.name]


def _fill(
    a: torch.Tensor, b: torch.Tensor, artefact: Artefact, block: Block, module: str, read: Read,
    base: BaseLayers,
) -> None:  # fmt: skip
    """Writes what one artefact does to one layer into its rows of A and columns of B."""
    start = block.start
    for member, (rank, parts) in enumerate(zip(block.ranks, artefact.parts, strict=True)):
        if part := parts.get(module):
            loaded = load_part(part, module, read, base)
            if loaded.a is not None and loaded.b is not None:
                a[start : start + part.rank] = loaded.a
                b[:, start : start + part.rank] = loaded.b
            for column, values in ((block.constants, loaded.constant),
                                   (block.diagonals, loaded.diagonal)):  # fmt: skip
                if values is not None:
                    b[:, column[member]] = values
        start += rank
    if block.gate is not None and module in artefact.gates:
        a[block.gate : block.gate + len(artefact.members)] = read(artefact.gates[module])


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
    if member != Member.of(artefact, member.digest, member.owner):
        raise FilesLost("the files have changed since they were checked", field=member.folder)
    return artefact
