"""Tensors of safetensors files are those that the library reads, and nothing stays behind."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import BadAdapter
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
    assert sys.getallocatedblocks() - before < 400
