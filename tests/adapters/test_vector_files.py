"""Vectors in others' files: which layer a number means, compared with hooks; what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.errors import AdapterError, BadAdapter, BadSource, DoesNotFit, TooLarge
from adapters.formats.base import BaseShapes
from adapters.formats.blocks import block, block_number
from adapters.formats.inspect import elements, inspect, read_artefact
from adapters.load import load_set
from adapters.sets import AdapterSet, Member
from adapters.sources.fetch import Fetcher
from adapters.sources.source import Allowed, parse_source
from adapters.sources.store import ContentStore
from tests.adapters.layers import CheckpointLayers

HIDDEN, LAYERS = 8, 4
SHAPES = BaseShapes({}, layers={block(n): (HIDDEN, HIDDEN) for n in range(LAYERS)})
Directions = dict[str, np.ndarray[Any, Any]]


def write_gguf(
    file: Path, directions: Directions, kind: str = "controlvector", **more: Any
) -> Path:
    """A control vector as repeng's `export_gguf` writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, kind)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for key, value in more.items():
        writer.add_array(key, value)
    for name, value in directions.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def bare(file: Path, directions: Directions) -> Path:
    """A safetensors file without a config."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: torch.from_numpy(v) for n, v in directions.items()}, file)
    return file


class Blocks(CheckpointLayers):
    """The outputs of decoder layers alone."""

    def __init__(self, shapes: BaseShapes) -> None:
        self._shapes = shapes


def constants(folder: Path, shapes: BaseShapes = SHAPES) -> dict[str, torch.Tensor]:
    """Module → what an adapter of weight 1 adds there, as an engine loads it."""
    artefact = inspect(folder, shapes, max_rank=8)
    found = AdapterSet.of([Member.of(artefact, artefact.digest(), "base")])
    made = {m: (a, b) for m, a, b in load_set(found, "base", torch.float32, Blocks(shapes))}
    return {m: b.sum(1) for m, (_, b) in made.items()}


@pytest.mark.parametrize("write", [
    lambda folder, v: write_gguf(folder / "vectors.gguf", {"direction.2": v}),
    lambda folder, v: bare(folder / "vectors.safetensors", {"2": v}),
    lambda folder, v: bare(folder / "vectors.safetensors", {"model.layers.2": v}),
])  # fmt: skip
def test_a_direction_acts_behind_the_layer_of_its_number(
    write: Callable[[Path, Any], Path], tmp_path: Path
) -> None:
    """Number 2 is the output of the third decoder layer: what layer 3 reads."""
    size = 32
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=50, hidden_size=size, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2,
    ))  # fmt: skip
    value = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    write(tmp_path / "v", value)
    shapes = BaseShapes({}, layers={block(n): (size, size) for n in range(LAYERS)})
    artefact = inspect(tmp_path / "v", shapes, max_rank=8)
    assert artefact.kind == "vector" and artefact.modules == (block(2),)
    assert elements(artefact) == size and artefact.constants == (True,)
    ids = torch.arange(10, 30)[None]
    entering: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, n=n: entering.update({n: args[0].detach().clone()})
        )
    model(ids)
    before, module = dict(entering), artefact.modules[0]
    added = constants(tmp_path / "v", shapes)[module]
    number = block_number(module)
    assert number is not None
    model.model.layers[number].register_forward_hook(lambda _, __, out: out + added)
    model(ids)
    for n in range(3):
        torch.testing.assert_close(entering[n], before[n], atol=0, rtol=0)
    moved = entering[3] - before[3]
    torch.testing.assert_close(moved, torch.from_numpy(value).expand_as(moved), atol=1e-5, rtol=0)


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = {f"direction.{n}": rng.standard_normal(HIDDEN).astype(np.float32) for n in (1, 3)}
    write_gguf(tmp_path / "vectors.gguf", values)
    found = constants(tmp_path)
    assert found.keys() == {block(1), block(3)}
    for n in (1, 3):
        np.testing.assert_array_equal(found[block(n)].numpy(), values[f"direction.{n}"])


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(("directions", "more", "kind", "error", "says"), [
    ({"direction.0": ones(8)}, {}, "controlvector", BadAdapter, "unexpected tensor"),
    ({"direction.01": ones(8)}, {}, "controlvector", BadAdapter, "unexpected tensor"),
    ({"direction.-1": ones(8)}, {}, "controlvector", BadAdapter, "unexpected tensor"),
    ({"blk.0.attn_q.weight": ones(8)}, {}, "controlvector", BadAdapter, "unexpected tensor"),
    ({"direction.1": ones(2, 8)}, {}, "controlvector", BadAdapter, r"not a vector.*\(8, 2\)"),
    ({"direction.1": ones(8, dtype=np.float64)}, {}, "controlvector", BadAdapter, "F64.*F32"),
    ({"direction.1": ones(8, dtype=np.float16)}, {}, "controlvector", BadAdapter, "F16.*F32"),
    ({"direction.1": ones(8)}, {}, "llama", BadAdapter, "no control vector.*llama"),
    ({"direction.1": ones(8)}, {"a": [1, 2]}, "controlvector", BadAdapter, "array"),
    ({}, {}, "controlvector", BadAdapter, "no vectors"),
    ({"direction.4": ones(8)}, {}, "controlvector", DoesNotFit, "0 to 3"),
    ({"direction.1": ones(7)}, {}, "controlvector", DoesNotFit, "shape"),
    ({"direction.1": np.full(8, np.nan, np.float32)}, {}, "controlvector", BadAdapter, "NaN"),
])  # fmt: skip
def test_what_is_no_control_vector_is_refused(
    directions: Directions, more: dict[str, Any], kind: str, error: type[AdapterError], says: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    write_gguf(tmp_path / "vectors.gguf", directions, kind, **more)
    with pytest.raises(error, match=says):
        inspect(tmp_path, SHAPES, max_rank=8)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "vectors.gguf", {"direction.1": ones(8), "direction.2": ones(8)})
    whole = file.read_bytes()
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        with pytest.raises(BadAdapter):
            inspect(tmp_path, SHAPES, max_rank=8)


def test_any_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "vectors.gguf", {"direction.1": ones(8)})
    whole = file.read_bytes()
    for at in range(len(whole) - 32):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            inspect(tmp_path, SHAPES, max_rank=8)
        except AdapterError:
            continue
        assert constants(tmp_path).keys() <= {block(n) for n in range(LAYERS)}


@pytest.mark.parametrize(("tensors", "keys", "says"), [
    (1 << 40, 1, "too many tensors"), (1, 1 << 40, "too many keys"),
])  # fmt: skip
def test_counts_are_bounded_before_anything_is_read(
    tensors: int, keys: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "vectors.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys))
    with pytest.raises(TooLarge, match=says):
        read_artefact(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "vectors.gguf").open("wb") as file:
        file.write(b"GGUF")
        file.truncate((64 << 20) + 1)
    with pytest.raises(TooLarge, match="too large"):
        read_artefact(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.shift", "vector", "1.rotate"])
def test_without_a_config_there_are_constants_behind_layers_only(name: str, tmp_path: Path) -> None:
    bare(tmp_path / "vectors.safetensors", {name: ones(8)})
    with pytest.raises(BadAdapter, match="unexpected tensor"):
        read_artefact(tmp_path)


def test_two_files_of_vectors_are_one_too_many(tmp_path: Path) -> None:
    bare(tmp_path / "vectors.safetensors", {"1": ones(8)})
    write_gguf(tmp_path / "vectors.gguf", {"direction.1": ones(8)})
    with pytest.raises(BadAdapter, match="two files"):
        read_artefact(tmp_path)


# --- as sources -------------------------------------------------------------------------------


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return Fetcher(ContentStore(tmp_path / "store"), Allowed((tmp_path / "in",)))


def test_a_source_may_be_a_folder_or_one_file_of_vectors(fetcher: Fetcher, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    bare(folder / "ours/vectors.safetensors", {"1": ones(8)})
    (folder / "ours/vector_config.json").write_text('{"kind": "vector", "scale": 2}')
    bare(folder / "Calm.safetensors", {"1": ones(8)})
    bare(folder / "bare/vectors.safetensors", {"1": ones(8)})
    write_gguf(folder / "sunny.GGUF", {"direction.1": ones(8)})
    write_gguf(folder / "llama/vectors.gguf", {"direction.1": ones(8)})
    digests = {}
    for name in ("ours", "Calm.safetensors", "bare", "sunny.GGUF", "llama"):
        source = parse_source(str(folder / name))
        assert fetcher.present(source)
        found = fetcher.fetch(source)
        assert found.kind == "vector" and found.digest == read_artefact(found.folder).digest()
        assert constants(found.folder)[block(1)].tolist() == [2.0 if name == "ours" else 1.0] * 8
        digests[name] = found.digest
    assert digests["Calm.safetensors"] == digests["bare"] != digests["ours"]
    assert digests["sunny.GGUF"] == digests["llama"] and len(set(digests.values())) == 3
    assert not fetcher.present(parse_source(str(folder / "absent.gguf")))
    with pytest.raises(BadAdapter, match="missing"):
        fetcher.fetch(parse_source(str(folder / "absent.gguf")))


def test_pickles_are_refused_with_the_converter_s_name(fetcher: Fetcher, tmp_path: Path) -> None:
    for text in ("/v/vec_layer_13.pt", "hf://a/b/x.bin"):
        with pytest.raises(BadSource, match="coxswain convert-vectors SOURCE OUT"):
            parse_source(text)
    folder = tmp_path / "in/reft"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"representations": [], "intervention_types": []}')
    with pytest.raises(BadAdapter, match="coxswain convert-vectors SOURCE OUT"):
        fetcher.fetch(parse_source(str(folder)))
    for name in ("x.gguf", "x.safetensors"):
        torch.save({"1": torch.ones(40)}, tmp_path / "in" / name)
        with pytest.raises(BadAdapter, match=r"pickle|not a GGUF"):
            fetcher.fetch(parse_source(str(tmp_path / "in" / name)))


@pytest.mark.parametrize(("text", "folder", "file"), [
    ("/a/b/x.gguf", "/a/b", "x.gguf"), ("hf://o/n@v1/sub/x.gguf", "sub", "x.gguf"),
    ("hf://o/n/x.safetensors", "", "x.safetensors"), ("s3://buck/a/x.gguf", "a", "x.gguf"),
    ("https://h/a/my%20x.GGUF", "a", "my x.GGUF"), ("hf://o/n.gguf", "", ""),
])  # fmt: skip
def test_the_file_of_a_source(text: str, folder: str, file: str) -> None:
    found = parse_source(text)
    assert (found.place if found.kind == "local" else found.folder, found.file) == (folder, file)
    assert parse_source(found.text) == found
