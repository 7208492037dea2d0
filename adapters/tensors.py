"""The tensors of a safetensors file, without the library's own reader.

safetensors 0.8.0 keeps two Python objects of every tensor that it makes for torch, for ever
(`sys.getallocatedblocks` before and after many `get_tensor`). A server that loads adapters all day
would grow: docs/internals/decisions/0015.
"""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.formats.header import read_header

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip


class TensorFile:
    """A file, mapped into memory until the last of its tensors is gone.

    Args:
        path: of the file.

    Raises:
        BadAdapter: not a safetensors file, or a broken one.
    """

    def __init__(self, path: Path) -> None:
        self._infos = read_header(path)
        size = path.stat().st_size
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor of the file, in its shape and dtype; not copied."""
        info = self._infos[name]
        dtype = _DTYPES[info.dtype]
        data = self._bytes[info.start : info.start + info.size]
        if info.start % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(info.shape)
