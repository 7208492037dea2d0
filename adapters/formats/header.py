"""The header of a safetensors file, read and checked without loading any tensor.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length n, n bytes
of JSON `{name: {dtype, shape, data_offsets}, "__metadata__": {…}}`, then the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from adapters.errors import BadAdapter

MAX_HEADER = 8 << 20
"""Bytes: some 80,000 tensors. The format allows 100 MB, which Python takes many seconds and
gigabytes to read."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip

_MOST_DIMENSIONS = 16
"""Maximum number of dimensions of a tensor; bounds the cost of shape products."""

_EXPONENTS = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
}
"""dtype → how to view it and its exponent bits, all set in NaN and infinity. numpy has no bf16."""

_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    Args:
        dtype: safetensors' name of it, e.g. `BF16`.
        shape: its dimensions.
        start: its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name: of a safetensors file, or of a control vector (`.gguf`).

    Raises:
        BadAdapter: not such a file, cut off, or with tensors that overlap or leave gaps.
    """
    if path.suffix == ".gguf":
        from adapters.formats.control_vector import read_directions

        return read_directions(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise BadAdapter("not a safetensors file", field=path.name)
        if length > MAX_HEADER:
            raise BadAdapter("its header is too long", field=path.name, value=f"{length} bytes",
                             allowed=f"at most {MAX_HEADER} bytes")  # fmt: skip
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadAdapter(f"broken header: {error}", field=path.name) from error
    if not isinstance(entries, dict):
        raise BadAdapter("broken header: not an object", field=path.name)
    entries.pop("__metadata__", None)
    tensors = {name: _entry(path.name, name, entry) for name, entry in entries.items()}
    end = 0
    for name, (_, start, stop) in sorted(tensors.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise BadAdapter("its data overlaps or leaves a gap", field=f"{path.name}: {name}")
        end = stop
    if end != size - 8 - length:
        raise BadAdapter(
            "the file is cut off or has bytes behind its last tensor",
            field=path.name,
            value=f"{size - 8 - length} bytes of data",
            allowed=str(end),
        )
    return {
        name: TensorInfo(info.dtype, info.shape, 8 + length + start)
        for name, (info, start, _) in tensors.items()
    }


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _entry(file: str, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """(the tensor, first and last + 1 byte of its data, counted from the end of the header)."""
    field = f"{file}: {name}"
    if not isinstance(entry, dict):
        raise BadAdapter("broken header entry", field=field)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadAdapter("unknown dtype", field=field, value=dtype, allowed=", ".join(BITS))
    if not (
        _naturals(shape)
        and _naturals(offsets)
        and len(offsets) == 2
        and len(shape) <= _MOST_DIMENSIONS
    ):
        raise BadAdapter("broken shape or offsets", field=field, value=(shape, offsets))
    info = TensorInfo(dtype, tuple(shape), 0)
    if offsets[1] - offsets[0] != info.size:
        raise BadAdapter("its size does not match its shape", field=field, value=tuple(shape))
    return info, offsets[0], offsets[1]


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def check_finite(path: Path, name: str, info: TensorInfo) -> None:
    """Reads a tensor's bytes once and raises if any value is NaN or infinite.

    A non-finite adapter would leave NaN in KV blocks that other requests use later.

    Raises:
        BadAdapter: a value is not finite, or the dtype is not one that adapters may have.
    """
    field = f"{path.name}: {name}"
    if info.dtype not in _EXPONENTS:
        raise BadAdapter(
            "dtype of adapter weights", field=field, value=info.dtype, allowed="F32, F16, BF16"
        )
    view, mask = _EXPONENTS[info.dtype]
    count = prod(info.shape)
    if not count:
        return
    values = np.memmap(path, view, "r", info.start, (count,))
    for start in range(0, count, _CHUNK):
        if ((values[start : start + _CHUNK] & mask) == mask).any():
            raise BadAdapter("has NaN or infinite values", field=field)
