"""What is read is what was written, and nothing broken, foreign or silent gets through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import BadAdapter, DoesNotFit, FilesLost
from adapters.formats.base import BaseShapes, base_shapes
from adapters.formats.header import read_header
from adapters.formats.inspect import inspect, read_artefact
from adapters.load import load_set
from adapters.sets import AdapterSet, Member
from tests.adapters.layers import CheckpointLayers
from tests.adapters.make import ALL, ATTENTION, make_lora, make_native, make_released
from tests.models import make_model

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, another base, an adapter and two packs."""
    folder = tmp_path_factory.mktemp("made")
    base = make_model(folder / "base", "llama")
    return {
        "base": base,
        "other": make_model(folder / "other", "qwen2"),
        "gpt2": make_model(folder / "gpt2", "gpt2"),
        "lora": make_lora(folder / "lora", base, seed=1, rank_pattern={"q_proj": 6}),
        "native": make_native(folder / "native", base, tasks=3, seed=2),
        "released": make_released(folder / "released", base, tasks=4, seed=3),
    }


@pytest.fixture(scope="module")
def base(made: dict[str, Path]) -> BaseShapes:
    return base_shapes(made["base"])


@pytest.fixture
def broken(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may break."""
    return {
        name: Path(shutil.copytree(made[name], tmp_path / name))
        for name in ("lora", "native", "released")
    }


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_lora_is_read_with_its_ranks_and_scales(made: dict[str, Path], base: BaseShapes) -> None:
    found = inspect(made["lora"], base, max_rank=64)
    assert (found.kind, found.members, found.ranks) == ("lora", ("adapter",), (6,))
    assert len(found.modules) == 2 * len(ALL)
    scales = {m.rsplit(".", 1)[1]: p.scale for m, p in found.parts[0].items()}
    assert scales == {name: 8 / 6 if name == "q_proj" else 2.0 for name in ALL}


def test_rank_stabilised_scales(made: dict[str, Path], base: BaseShapes, tmp_path: Path) -> None:
    folder = make_lora(tmp_path, made["base"], seed=1, targets=ATTENTION, use_rslora=True)
    parts = inspect(folder, base, max_rank=64).parts[0]
    assert {p.scale for p in parts.values()} == {4.0}


def test_packs_are_read(made: dict[str, Path], base: BaseShapes) -> None:
    native = inspect(made["native"], base, max_rank=64)
    assert (native.kind, native.ranks, native.top_k) == ("meteora", (2, 3, 4), 2)
    assert native.gates.keys() == set(native.modules)
    assert len(native.parts[1]) == 2 * len(ATTENTION)
    released = inspect(made["released"], base, max_rank=64)
    assert released.ranks == (2,) * 4
    part = released.parts[3]["model.layers.1.mlp.up_proj"]
    assert (part.start, part.stop, part.scale) == (6, 8, 2.0)


def test_a_layer_stored_transposed_fits(made: dict[str, Path], tmp_path: Path) -> None:
    folder = make_lora(tmp_path, made["gpt2"], seed=1, targets=["c_attn"], fan_in_fan_out=True)
    shapes = base_shapes(made["gpt2"])
    assert shapes.linear("transformer.h.0.attn.c_attn") == (192, 64)
    inspect(folder, shapes, max_rank=64)


@pytest.mark.parametrize("name", ["lora", "native", "released"])
def test_another_base_is_refused(made: dict[str, Path], name: str) -> None:
    with pytest.raises(DoesNotFit, match=r"proj|base"):
        inspect(made[name], base_shapes(made["other"]), max_rank=64)


@pytest.mark.parametrize(("name", "width"), [("lora", 6), ("native", 12), ("released", 12)])
def test_too_much_rank_is_refused(
    made: dict[str, Path], base: BaseShapes, name: str, width: int
) -> None:
    inspect(made[name], base, max_rank=width)
    with pytest.raises(DoesNotFit, match="rank"):
        inspect(made[name], base, max_rank=width - 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora is true, and its vector is missing"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 5}, "rank"),
        ({"r": 0}, "not a rank"),
        ({"r": True}, "not a rank"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": 1e999}, "lora_alpha"),
        ({"rank_pattern": {"(q_proj)\\1": 3}}, "groupref is not taken"),
        ({"rank_pattern": {"(": 3}}, "pattern"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
    ],
)
def test_configs_that_are_refused(
    broken: dict[str, Path], base: BaseShapes, changes: dict[str, Any], says: str
) -> None:
    edit(broken["lora"] / "adapter_config.json", **changes)
    with pytest.raises(BadAdapter, match=says):
        inspect(broken["lora"], base, max_rank=64)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    """Sets one tensor."""
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("base_model.model.lm_head.weight", torch.ones(2, 2)), "also changes lm_head"),
        (put(f"{Q}.lora_magnitude_vector", torch.ones(2)), "use_dora is false"),
        (put(f"{Q.replace('0', '7')}.lora_A.weight", torch.ones(6, 128)), "lora_B is missing"),
        (lambda tensors: tensors.pop(f"{Q}.lora_A.weight"), "lora_A is missing"),
        (put(f"{Q}.lora_A.weight", torch.ones(6, 64)), r"q_proj.lora_A.*fit the base"),
        (put(f"{Q}.lora_B.weight", torch.ones(64, 6)), r"q_proj.lora_B.*fit the base"),
        (put(f"{Q}.lora_B.weight", torch.ones(128, 4)), "rank 6"),
        (put(f"{Q}.lora_B.weight", torch.full((128, 6), torch.inf)), "q_proj.lora_B.*NaN"),
        (put(f"{Q}.lora_B.weight", torch.full((128, 6), torch.nan).bfloat16()), "NaN"),
        (put(f"{Q}.lora_B.weight", torch.full((128, 6), torch.nan).half()), "NaN"),
        (put(f"{Q}.lora_B.weight", torch.ones(128, 6, dtype=torch.int32)), "dtype"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    broken: dict[str, Path],
    base: BaseShapes,
    change: Callable[[dict[str, torch.Tensor]], None],
    says: str,
) -> None:
    rewrite(broken["lora"] / WEIGHTS, change)
    with pytest.raises((BadAdapter, DoesNotFit), match=says):
        inspect(broken["lora"], base, max_rank=64)


def test_a_module_that_the_base_lacks_is_refused(broken: dict[str, Path], base: BaseShapes) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for half in "AB":
            name = f"{Q}.lora_{half}.weight"
            tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)

    rewrite(broken["lora"] / WEIGHTS, rename)
    with pytest.raises(DoesNotFit, match=r"layers\.9"):
        inspect(broken["lora"], base, max_rank=64)


def test_an_unembedding_is_no_linear_layer(base: BaseShapes) -> None:
    assert base.linear("lm_head") is None
    assert base.linear("model.embed_tokens") is None
    assert base.linear("model.norm") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:20],
        lambda data: b"",
        lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
        lambda data: b"\x80\x04\x95" + data,  # a pickle's first bytes
        lambda data: data.replace(b'"F32"', b'"F64"', 1),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        lambda data: data.replace(b'"shape":[6,', b'"shape":[7,', 1),
        lambda data: data.replace(b'"shape":[6,', b'"shape":[-1', 1),
        lambda data: data.replace(b".layers.1.", b".layers.0."),  # names twice
    ],
    ids=[
        "cut", "longer", "header cut", "empty", "huge header", "pickle", "dtype", "gap", "shape",
        "negative shape", "names twice",
    ],
)  # fmt: skip
def test_broken_files_are_refused(
    broken: dict[str, Path], base: BaseShapes, damage: Callable[[bytes], bytes]
) -> None:
    path = broken["lora"] / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(BadAdapter, match=WEIGHTS):
        inspect(broken["lora"], base, max_rank=64)


def test_headers_agree_with_the_library(made: dict[str, Path]) -> None:
    path = made["released"] / "model.safetensors"
    shapes = {name: info.shape for name, info in read_header(path).items()}
    assert shapes == {name: tuple(t.shape) for name, t in load_file(path).items()}


def test_pickles_links_and_empty_folders_are_refused(
    broken: dict[str, Path], base: BaseShapes, made: dict[str, Path], tmp_path: Path
) -> None:
    path = broken["lora"] / WEIGHTS
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(BadAdapter, match="missing"):
        inspect(broken["lora"], base, max_rank=64)
    path.symlink_to(made["lora"] / WEIGHTS)
    with pytest.raises(BadAdapter, match="out of the adapter's folder"):
        inspect(broken["lora"], base, max_rank=64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadAdapter, match="no adapter here"):
        inspect(tmp_path / "empty", base, max_rank=64)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("native", {"layout": "other"}, "layout"),
        ("native", {"rank": 8}, "rank"),
        ("native", {"tasks": ["task0", "../lora"]}, "tasks"),
        ("native", {"tasks": ["task0", "task0"]}, "tasks"),
        ("native", {"tasks": ["task0", "task1"]}, "tasks and rank"),
        ("native", {"top_k": 4}, "top_k"),
        ("native", {"temperature": 0}, "temperature"),
        ("released", {"rank": 3}, "tasks and rank"),
        ("released", {"rank": None}, "rank"),
        ("released", {"alpha": -1}, "alpha"),
        ("released", {"tasks": []}, "tasks"),
        ("released", {"temperature": 1e999}, "temperature"),
    ],
)
def test_pack_configs_that_are_refused(
    broken: dict[str, Path], base: BaseShapes, name: str, changes: dict[str, Any], says: str
) -> None:
    edit(broken[name] / "meteora.json", **changes)
    with pytest.raises(BadAdapter, match=says):
        inspect(broken[name], base, max_rank=64)


def test_packs_with_wrong_tensors_are_refused(broken: dict[str, Path], base: BaseShapes) -> None:
    name = "model.layers.0.self_attn.q_proj.moe_gate.weight"
    gates, released = (
        broken["native"] / "gates.safetensors",
        broken["released"] / "model.safetensors",
    )
    original = gates.read_bytes()
    for path, change, says in [
        (gates, lambda t: t.pop(name), "no gate"),
        (gates, put("model.layers.7.mlp.up_proj.moe_gate.weight", torch.ones(3, 128)), "no module"),
        (gates, put(name, torch.ones(3, 64)), "fit the base"),
        (gates, put(name, torch.full((3, 128), torch.nan)), "NaN"),
        (released, lambda t: t.pop(f"{Q}.moe_gate.weight"), "moe_gate is missing"),
    ]:
        rewrite(path, change)
        with pytest.raises((BadAdapter, DoesNotFit), match=says):
            inspect(path.parent, base, max_rank=64)
        gates.write_bytes(original)


def test_a_released_pack_of_another_base_of_the_same_size_is_refused(
    broken: dict[str, Path], base: BaseShapes
) -> None:
    path = broken["released"] / "model.safetensors"
    rewrite(path, put("base_model.model.model.embed_tokens.weight", torch.ones(501, 128)))
    with pytest.raises(DoesNotFit, match="another model"):
        inspect(path.parent, base, max_rank=64)


def test_the_digest_is_of_the_content(made: dict[str, Path], broken: dict[str, Path]) -> None:
    for name, folder in broken.items():
        digest = read_artefact(folder).digest()
        assert digest == read_artefact(made[name]).digest()
        (folder / "README.md").write_text("not part of it")
        assert read_artefact(folder).digest() == digest
    rewrite(broken["lora"] / WEIGHTS, put(f"{Q}.lora_A.weight", torch.ones(6, 128)))
    assert read_artefact(broken["lora"]).digest() != read_artefact(made["lora"]).digest()
    edit(broken["native"] / "meteora.json", top_k=1)
    assert read_artefact(broken["native"]).digest() != read_artefact(made["native"]).digest()


def test_a_set_is_stacked_as_its_layout_says(made: dict[str, Path]) -> None:
    members = [
        Member.of(read_artefact(made[name]), name * 2, "base") for name in ("native", "lora")
    ]
    found = AdapterSet.of([*members, members[0]])
    assert found == AdapterSet.of(reversed(members))
    assert AdapterSet.from_path(str(found.lora_request()["lora_path"])) == found
    layout = found.layout("base")
    assert (layout.columns, layout.rows, found.rank) == (6 + 9, 6 + 9 + 3, 18)
    lora, native = layout.blocks
    assert (lora.start, native.start, native.gate) == (0, 6, 15)
    stacked = {
        m: (a, b)
        for m, a, b in load_set(found, "base", torch.float32, CheckpointLayers(made["base"]))
    }
    a, b = stacked["model.layers.0.mlp.down_proj"]
    tensors = load_file(made["lora"] / WEIGHTS)
    down = "base_model.model.model.layers.0.mlp.down_proj"
    assert torch.equal(a[:4], tensors[f"{down}.lora_A.weight"])
    assert not a[4:6].any() and not b[:, 4:6].any()  # rank 4 where q_proj has 6
    assert torch.equal(b[:, :4], 2.0 * tensors[f"{down}.lora_B.weight"])
    third = load_file(made["native"] / "task2" / WEIGHTS)
    assert torch.equal(a[11:15], third[f"{down}.lora_A.weight"])
    assert torch.equal(b[:, 11:15], 2.0 * third[f"{down}.lora_B.weight"])
    assert not a[8:11].any() and not b[:, 8:11].any()  # the second task leaves the MLP alone
    gates = load_file(made["native"] / "gates.safetensors")
    assert torch.equal(a[15:], gates["model.layers.0.mlp.down_proj.moe_gate.weight"])


def test_a_set_whose_files_changed_is_refused(
    broken: dict[str, Path], made: dict[str, Path]
) -> None:
    found = AdapterSet.of([Member.of(read_artefact(broken["native"]), "d", "base")])
    edit(broken["native"] / "meteora.json", tasks=["task1", "task0", "task2"])
    with pytest.raises(FilesLost, match="changed"):
        list(load_set(found, "base", torch.float32, CheckpointLayers(made["base"])))


def test_values_that_the_engines_dtype_cannot_hold_are_refused(
    broken: dict[str, Path], base: BaseShapes, made: dict[str, Path]
) -> None:
    rewrite(broken["lora"] / WEIGHTS, put(f"{Q}.lora_B.weight", torch.full((128, 6), 50_000.0)))
    layers = CheckpointLayers(made["base"])
    member = Member.of(inspect(broken["lora"], base, max_rank=64), "d", "base")
    list(load_set(AdapterSet.of([member]), "base", torch.float32, layers))
    with pytest.raises(BadAdapter, match="too large for float16"):
        list(load_set(AdapterSet.of([member]), "base", torch.float16, layers))
    edit(broken["lora"] / "adapter_config.json", lora_alpha=1e300)
    with pytest.raises(BadAdapter, match="too large for float32"):
        list(load_set(AdapterSet.of([member]), "base", torch.float32, layers))


def test_ids_of_sets_fit_int32_and_are_not_vllms_own() -> None:
    """Model Runner V2 keeps them in int32; vLLM's own begin at 1."""
    sets = [AdapterSet.of([Member("base", str(i), "/nowhere", (4,), False)]) for i in range(2000)]
    ids = [found.set_id for found in sets]
    assert min(ids) >= 1 << 20 and max(ids) <= torch.iinfo(torch.int32).max
    assert all(found.lora_request()["lora_int_id"] == found.set_id for found in sets)
    assert len(set(ids)) > 1990 and max(ids) > 1 << 30  # all bits are used
