"""llama.cpp's control vectors: where the tensors of a GGUF file lie. No value is read.

    general.architecture = "controlvector"
    direction.<n>    F32 [H], added to the output of decoder layer n, counted from 0; n ≥ 1

As llama.cpp's `common/common.cpp` and repeng's `export_gguf` have it; the format itself is read by
the `gguf` library. Files of llama.cpp's own cvector-generator hold under `direction.<n>` what was
taken at the output of layer n − 1: they act, there and here, one layer behind.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter, TooLarge
from adapters.formats.header import TensorInfo

MAX_BYTES = 64 << 20
"""Largest file read: a vector of 16,384 numbers behind each of 1,000 layers."""

_MOST_TENSORS, _MOST_KEYS = 1024, 256
_NAME = re.compile(r"direction\.[1-9][0-9]{0,3}")


def read_directions(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a control vector by name.

    Raises:
        TooLarge: more bytes, tensors or keys than any has.
        BadAdapter: no GGUF file, a broken one, or one of something else.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise TooLarge("the file is too large", field=path.name, value=size,
                       allowed=f"at most {MAX_BYTES} bytes")  # fmt: skip
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise BadAdapter("not a GGUF file", field=path.name)
    for at, what, most in ((8, "tensors", _MOST_TENSORS), (16, "keys", _MOST_KEYS)):
        if (count := int.from_bytes(head[at : at + 8], "little")) > most:
            raise TooLarge(f"too many {what}", field=path.name, value=count,
                           allowed=f"at most {most}, little-endian")  # fmt: skip
    try:
        reader = _opened(path)
        kind = reader.fields["general.architecture"].contents()
    except Exception as error:  # the library raises any class on a broken file
        raise BadAdapter(f"broken: {type(error).__name__}: {error}", field=path.name) from error
    if kind != "controlvector":
        raise BadAdapter("no control vector", field=f"{path.name}: general.architecture",
                         value=kind, allowed="controlvector")  # fmt: skip
    return {tensor.name: _info(path.name, tensor, size) for tensor in reader.tensors}


def _opened(path: Path) -> Any:
    # Imported when needed: most servers read no GGUF.
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """Without arrays, of which control vectors have none: a few bytes can claim millions."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                raise ValueError("an array among the metadata")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(path)


def _info(file: str, tensor: Any, size: int) -> TensorInfo:
    field = f"{file}: {tensor.name}"
    if not _NAME.fullmatch(tensor.name):
        raise BadAdapter("unexpected tensor", field=field, allowed="direction.<n>, n ≥ 1")
    if tensor.tensor_type.name != "F32":
        raise BadAdapter("dtype of a vector", field=field, value=tensor.tensor_type.name,
                         allowed="F32")  # fmt: skip
    shape = tuple(int(n) for n in tensor.shape)
    info = TensorInfo("F32", shape, int(tensor.data_offset))
    if len(shape) != 1 or info.start + info.size > size:
        raise BadAdapter("not a vector inside the file", field=field, value=shape, allowed="[H]")
    return info
