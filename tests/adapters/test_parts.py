"""What no honest PEFT folder has: tensors, shards and configs that do not go together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterError, BadAdapter, DoesNotFit
from adapters.formats.base import base_shapes
from adapters.formats.inspect import elements, inspect, read_artefact
from adapters.formats.peft import INDEX
from adapters.load import load_set
from adapters.sets import AdapterSet, Member
from tests.adapters.kinds import (
    ALL,
    WEIGHTS,
    Case,
    adalora,
    ia3,
    lora,
    make,
    make_base,
    shard,
    vera,
)
from tests.adapters.layers import CheckpointLayers, loaded

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
PREFIX = "base_model.model."

Change = Callable[[dict[str, torch.Tensor]], Any]
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Architecture → the folder of a tiny model."""
    return cache(lambda name: make_base(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def made(
    bases: Bases, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[], Any]], Path]:
    """Config → an adapter; equal configs are made once."""
    found: dict[str, Path] = {}

    def make_once(config: Callable[[], Any]) -> Path:
        key = str(config())
        if key not in found:
            folder = tmp_path_factory.mktemp("made")
            found[key] = make(Case("", config), folder, bases("llama"))
        return found[key]

    return make_once


def rewrite(folder: Path, change: Change, **config: Any) -> None:
    """Changes tensors and keys of the config."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def put(name: str, *shape: int) -> Change:
    """Sets one tensor."""
    return lambda tensors: tensors.__setitem__(f"{PREFIX}{name}", torch.ones(shape))


def rename(old: str, new: str) -> Change:
    """Renames one tensor."""
    return lambda t: t.__setitem__(new, t.pop(f"{PREFIX}{old}"))


def drop(name: str) -> Change:
    """Removes one tensor."""
    return lambda tensors: tensors.pop(f"{PREFIX}{name}")


ROWS: tuple[tuple[Callable[[], Any], Change, dict[str, Any], str], ...] = (
    (lora(use_dora=True), put(f"{Q}.lora_magnitude_vector", 64), {}, "does not fit"),
    (lora(use_dora=True), drop(f"{Q}.lora_magnitude_vector"), {}, "vector is missing"),
    (lora(use_dora=True), drop(f"{Q}.lora_A.weight"), {}, "lora_A is missing"),
    (lora(use_dora=True), put(f"{Q}.lora_B.bias", 128), {}, "lora_bias is false"),
    (lora(), put(f"{Q}.base_layer.bias", 128), {}, "a bias that the base's layer lacks"),
    (lora(), put(f"{Q}.base_layer.bias", 1, 128), {}, "not a bias"),
    (lora(), put(f"{Q}.bias", 128), {}, "base_layer.bias; rename it"),
    (lora(), put(f"{Q}.base_layer.weight", 128, 128), {}, "also changes q_proj"),
    (lora(), put("model.norm.bias", 128), {}, "changes the norm model.norm"),
    (lora(), rename(f"{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_A.default.weight"), {},
     "name of an adapter"),
    (lora(), rename(f"{Q}.lora_A.weight", f"{Q}.lora_A.weight"), {}, "begin with base_model"),
    (lora(), put(f"{Q}.hada_w1_a", 2, 2), {}, "another kind of adapter .hada. than .* LORA"),
    (lora(), put(f"{Q}.oft_R.weight", 2, 2), {}, "another kind of adapter .oft."),
    (lora(), put("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 128), {},
     "also changes embed_tokens .trainable_token_indices"),
    (lora(), put("score.weight", 2, 128), {}, "also changes score"),
    (lora(), put("anything", 2), {}, "unexpected tensor"),
    (lora(), lambda _: None, {"use_new": True}, "use_new: an option that this server does not"),
    (lora(), lambda _: None, {"new_config": {"a": 1}}, "new_config: an option"),
    (lora(), lambda _: None, {"init_lora_weights": "Xavier"}, "no initialisation that PEFT knows"),
    (lora(), lambda _: None, {"modules_to_save": "lm_head"}, "modules_to_save: not a list"),
    (ia3(["q_proj"], []), put(f"{Q}.ia3_l", 1, 128), {}, "does not fit.*as feedforward_modules"),
    (ia3(["q_proj"], []), put(f"{Q}.ia3_l", 64, 1), {}, "does not fit the base"),
    (ia3(["down_proj"], ["down_proj"]), put(f"{DOWN}.ia3_l", 1, 96 + 1), {}, "does not fit"),
    (ia3(["q_proj"], []), lambda _: None, {"feedforward_modules": None}, "must name the layers"),
    (adalora(), put(f"{Q}.lora_E", 4), {}, "does not fit"),
    (adalora(), drop(f"{Q}.lora_E"), {}, "lora_E is missing"),
    (adalora(), lambda _: None, {"rank_pattern": {f"{Q}.lora_E": [True]}}, "4 truth values"),
    (adalora(), lambda _: None, {"rank_pattern": {f"{Q}.lora_E": [True] * 3 + [False]}}, "rank 3"),
    (adalora(), lambda _: None, {"init_r": 8}, "rank 8"),
    (vera(), lambda t: t.pop("base_model.vera_A"), {}, "vera_A is missing"),
    (vera(), lambda t: t.update({"base_model.vera_A": torch.ones(8, 8)}), {},
     "vera_A.*fit the base"),
    (vera(), put(f"{Q}.vera_lambda_d", 4), {}, "does not fit"),
    (vera(), put(f"{Q}.vera_lambda_b", 64), {}, "does not fit the base"),
    (vera(), lambda _: None, {"r": 4}, "rank 4"),
)  # fmt: skip


@pytest.mark.parametrize(("config", "change", "keys", "says"), ROWS, ids=[row[3] for row in ROWS])
def test_what_does_not_go_together_is_refused(
    config: Callable[[], Any], change: Change, keys: dict[str, Any], says: str, bases: Bases,
    made: Callable[[Callable[[], Any]], Path], tmp_path: Path,
) -> None:  # fmt: skip
    base = bases("llama")
    folder = Path(shutil.copytree(made(config), tmp_path / "adapter"))
    rewrite(folder, change, **keys)
    with pytest.raises(AdapterError, match=says):
        inspect(folder, base_shapes(base), max_rank=64)


@pytest.mark.parametrize(
    "keys",
    [{"lora_dtype": None}, {"lorap_emb_lr": 1e-6}, {"use_new": False}, {"peft_version": "9"},
     {"auto_mapping": {"unsloth_fixed": True}}],
)  # fmt: skip
def test_keys_of_other_trainers_do_no_harm(
    keys: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    folder = make(Case("", lora()), tmp_path, bases("llama"))
    rewrite(folder, lambda _: None, **keys)
    assert read_artefact(folder).kind == "lora"


def test_dumps_with_a_weight_in_the_magnitudes_name_are_read(bases: Bases, tmp_path: Path) -> None:
    folder = make(Case("", lora(use_dora=True)), tmp_path, bases("llama"))
    name = f"{Q}.lora_magnitude_vector"
    before = loaded(folder, bases("llama"))[Q].diagonal
    rewrite(folder, rename(name, f"{PREFIX}{name}.weight"))
    after = loaded(folder, bases("llama"))[Q].diagonal
    assert before is not None and after is not None and torch.equal(before, after)


@pytest.mark.parametrize("left", [0.0, 1e-4])
def test_a_product_that_cancels_a_row_is_refused(left: float, bases: Bases, tmp_path: Path) -> None:
    """Its norm, a small difference of large numbers, would be noise."""
    base = bases("llama")
    folder = make(Case("", lora(use_dora=True, target_modules=["q_proj"])), tmp_path, base)
    row = load_file(base / "model.safetensors")[f"{Q}.weight"][3]

    def cancel(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{Q}.lora_A.weight"][0] = row
        tensors[f"{PREFIX}{Q}.lora_B.weight"][3] = torch.tensor([-0.5 * (1 - left), 0, 0, 0])

    rewrite(folder, cancel)  # the scale is 2
    inspect(folder, base_shapes(base), max_rank=64)
    with pytest.raises(BadAdapter, match="q_proj: DoRA's product cancels a row"):
        loaded(folder, base)


def test_a_norm_before_the_down_projection_is_in_the_way(bases: Bases, tmp_path: Path) -> None:
    """BitNet has one; the scale of its output does not pass."""
    base = bases("llama")
    folder = make(Case("", ia3(["down_proj"], ["down_proj"])), tmp_path, base)
    shapes = base_shapes(base)
    inspect(folder, shapes, max_rank=64)
    more = {"model.layers.0.mlp.ffn_sub_norm.weight": (192,)}
    with pytest.raises(DoesNotFit, match=r"ffn_sub_norm.*not follow the gate directly"):
        inspect(folder, replace(shapes, tensors=shapes.tensors | more), max_rank=64)


def test_an_mlp_without_a_gate_does_not_let_a_scale_through(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    folder = make(Case("", ia3(["down_proj"], ["down_proj"])), tmp_path, base)
    shapes = base_shapes(base)
    some = {n: s for n, s in shapes.tensors.items() if "gate_proj" not in n}
    with pytest.raises(DoesNotFit, match="scales the input of a layer"):
        inspect(folder, replace(shapes, tensors=some), max_rank=64)


def test_constants_and_diagonals_take_rank(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    folder = make(Case("", lora(use_dora=True, r=4)), tmp_path, base)
    found = inspect(folder, base_shapes(base), max_rank=6)
    assert (found.kind, found.ranks, found.constants, found.diagonals) == (
        "dora", (4,), (True,), (True,)
    )  # fmt: skip
    with pytest.raises(DoesNotFit, match=r"rank indices .got 6.; allowed: ≤ 5"):
        inspect(folder, base_shapes(base), max_rank=5)
    plain = make(Case("", lora(r=4)), tmp_path / "plain", base)
    out = sum(shape[0] for n in ALL if (shape := base_shapes(base).linear(Q.replace(
        "self_attn.q_proj", f"{'self_attn' if n in ALL[:4] else 'mlp'}.{n}"))))  # fmt: skip
    assert elements(found) - elements(read_artefact(plain)) == 2 * out  # two layers


def test_shared_projections_count_for_each_layer(bases: Bases, tmp_path: Path) -> None:
    """The engine holds A and B of each; the file holds them once."""
    found = read_artefact(make(Case("", vera(target_modules=["q_proj"])), tmp_path, bases("llama")))
    assert elements(found) == 2 * (8 * (128 + 128) + 128)


def test_a_set_holds_products_constants_and_diagonals_side_by_side(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("qwen2")
    configs = {"a": lora(use_dora=True), "b": ia3(["v_proj"], []), "c": lora(lora_bias=True, r=2)}
    folders = {n: make(Case(n, c), tmp_path / n, base) for n, c in configs.items()}
    members = [Member.of(read_artefact(folder), n, "base") for n, folder in folders.items()]
    found = AdapterSet.of(members)
    stacked = {
        m: (a, b) for m, a, b in load_set(found, "base", torch.float32, CheckpointLayers(base))
    }
    parts = {name: loaded(folder, base) for name, folder in folders.items()}
    a, b = stacked[Q.replace("q_proj", "v_proj")]
    layout = found.layout("base")
    assert (layout.products, layout.constants, layout.diagonals) == (6, 2, 2)
    module = Q.replace("q_proj", "v_proj")
    own = {name: part[module] for name, part in parts.items() if module in part}
    one, two, three = own["a"], own["b"], own["c"]
    assert same(a[:4], one.a) and same(b[:, :4], one.b)
    assert same(a[4:6], three.a) and same(b[:, 4:6], three.b)
    assert not a[6:].any()
    assert same(b[:, 6], one.constant) and same(b[:, 7], three.constant)
    assert same(b[:, 8], one.diagonal) and same(b[:, 9], two.diagonal)


def same(found: torch.Tensor, wanted: torch.Tensor | None) -> bool:
    return wanted is not None and torch.equal(found, wanted)


# ---- shards ----------------------------------------------------------------------------------


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Changes the map of the index."""
    path = folder / INDEX
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.__setitem__("extra", next(iter(m.values()))), "this file lacks"),
        (lambda m: m.pop(next(iter(m))), "not in the index"),
        (lambda m: m.__setitem__(next(iter(m)), "../other.safetensors"), "beside the index"),
        (lambda m: m.__setitem__(next(iter(m)), "model.bin"), "beside the index"),
        (lambda m: m.__setitem__("extra", "gone.safetensors"), "missing"),
        (lambda m: m.clear(), "no weight_map"),
        (lambda m: m.update({f"t{i}": f"{i}.safetensors" for i in range(2000)}), "too many files"),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    change: Callable[[dict[str, str]], Any], says: str, bases: Bases, tmp_path: Path
) -> None:
    folder = make(Case("", lora(), change=shard), tmp_path, bases("llama"))
    read_artefact(folder)
    index(folder, change)
    with pytest.raises(BadAdapter, match=says):
        read_artefact(folder)


def test_packs_of_a_set_have_gate_rows_of_their_own() -> None:
    """Behind all products; a plain adapter between them has none."""
    ranks = {"a": (2, 1), "b": (4,), "c": (1, 1)}
    members = [Member("base", d, "", r, routed=len(r) > 1) for d, r in ranks.items()]
    layout = AdapterSet.of(members).layout("base")
    assert [block.gate for block in layout.blocks] == [9, None, 11]
    assert (layout.products, layout.gates, layout.rows) == (9, 4, 13)
