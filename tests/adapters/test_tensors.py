"""Tensors of safetensors files are those that the library reads, and nothing stays behind."""

from __future__ import annotations

import gc
import json
import sys
from contextlib import nullcontext
from math import inf, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import BadAdapter
from adapters.formats.header import check_finite, read_header
from adapters.tensors import TensorFile

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 4), "number": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def test_every_dtype_and_shape_is_what_the_library_reads(file: Path) -> None:
    read = TensorFile(file)
    for name, expected in load_file(file).items():
        found = read[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.view(torch.uint8) if found.dim() else found,
                           expected.view(torch.uint8) if found.dim() else expected)  # fmt: skip


def test_tensors_that_begin_at_odd_bytes_are_read(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 3.25])
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 + -len(header) % 8)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    assert TensorFile(path)["x"].tolist() == values.tolist()


@pytest.mark.parametrize("second", [[4, 12], [8, 16]], ids=["overlap", "gap"])
def test_tensors_lie_side_by_side(tmp_path: Path, second: list[int]) -> None:
    """The bytes are as many as the header says, but two tensors share some, or none has some."""
    shapes = {"a": [0, 8 if second[0] == 4 else 4], "b": second}
    entries = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in shapes.items()
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(second[1]))
    with pytest.raises(BadAdapter, match=r"b: its data overlaps or leaves a gap"):
        TensorFile(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "one.safetensors"
    most = torch.finfo(dtype).max
    for value, finite in ((most, True), (-most, True), *((v, False) for v in (inf, -inf, nan))):
        tensor = torch.zeros(7, 5, dtype=dtype)
        tensor[-1, 2] = value
        save_file({"x": tensor}, path)
        with nullcontext() if finite else pytest.raises(BadAdapter, match="x: has NaN or infin"):
            check_finite(path, "x", read_header(path)["x"])


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.safetensors"
    path.write_bytes(b"x" * 100)
    with pytest.raises(BadAdapter, match="not a safetensors file"):
        TensorFile(path)


def test_a_header_of_many_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    length = (8 << 20) + 1
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    with pytest.raises(BadAdapter, match=r"its header is too long .*8388609 bytes.*8388608 bytes"):
        TensorFile(path)


def test_nothing_stays_in_memory(file: Path) -> None:
    def look() -> None:
        read = TensorFile(file)
        for dtype in DTYPES:
            read[str(dtype)][1:]

    look()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(200):
        look()
    gc.collect()
    # The library's reader leaves 2 for each of these 2,400 tensors.
    assert sys.getallocatedblocks() - before < 1200
