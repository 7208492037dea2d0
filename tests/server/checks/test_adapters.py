"""How much memory adapters take before any is loaded, and what of them can be checked when."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from adapters.errors import DoesNotFit
from adapters.formats.base import BaseShapes, base_shapes, plain_shapes
from adapters.formats.inspect import inspect
from adapters.formats.peft import CONFIG, WEIGHTS
from server.checks.adapters import Target, slot_bytes, targets
from server.settings.file import parse
from tests.adapters.make import make_lora

Folders = dict[str, Path]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return {"lora": make_lora(tmp_path_factory.mktemp("a") / "lora", models / "base", seed=1)}


def copy(folder: Path, into: Path) -> Path:
    """A copy to change."""
    shutil.copytree(folder, into)
    return into


def test_every_place_takes_both_sides_of_every_linear_layer() -> None:
    adapters = {"max_loaded": 3, "max_rank": 60}
    shapes = BaseShapes({
        "model.layers.0.mlp.up_proj.weight": (5, 8), "model.embed_tokens.weight": (100, 8),
        "model.norm.weight": (8,),
    })  # fmt: skip
    for dtype, item in (("auto", 2), ("float32", 4)):
        config = parse({"model": "o/m", "adapters": adapters, "engine": {"dtype": dtype}},
                       Path("/"), {})  # fmt: skip
        assert config.adapters is not None
        # 60 rank indices take a slot of 64.
        assert slot_bytes(config, config.adapters, [shapes, shapes]) == 2 * 13 * 64 * 3 * item


KNOWN = ("./zoo/models/big", "/home/x/zoo/models/big", "served", "Org/Big-7B")


@pytest.mark.parametrize(
    "said",
    ["", ".", "/elsewhere/big", "big/", r"C:\models\BIG", "other-org/big-7b", "Served",
     "/root/.cache/huggingface/hub/models--Org--Big-7B/snapshots/0a1b2c"],
)  # fmt: skip
def test_an_adapter_that_says_nothing_or_this_model_gets_no_warning(said: str) -> None:
    assert Target("base", BaseShapes({}), KNOWN).warning(said) is None
    assert Target("base", BaseShapes({})).warning(said or "anything") is None


@pytest.mark.parametrize(
    "said",
    ["small", "Org/Big-13B", "/models/big/small",
     "/root/.cache/huggingface/hub/models--Org--Small/snapshots/0a1b2c"],
)  # fmt: skip
def test_an_adapter_that_names_another_model_gets_a_warning(said: str) -> None:
    text = Target("base", BaseShapes({}), KNOWN).warning(said)
    assert text is not None and said in text and KNOWN[0] in text


def test_before_an_engine_is_up_only_what_is_certain_is_refused(
    models: Path, folders: Folders, tmp_path: Path
) -> None:
    """A quantised layer is stored in other shapes, and an engine may know other names."""
    shapes = plain_shapes(models / "base")
    assert inspect(folders["lora"], shapes, max_rank=16).modules
    tensors = load_file(folders["lora"] / WEIGHTS)
    other = copy(folders["lora"], tmp_path / "other")
    renamed = {k.replace("model.layers", "model.language_model.layers"): v
               for k, v in tensors.items()}  # fmt: skip
    save_file(renamed, other / WEIGHTS)
    assert inspect(other, shapes, max_rank=16).modules
    with pytest.raises(DoesNotFit, match="no such linear layer"):
        inspect(other, base_shapes(models / "base"), max_rank=16)
    packed = BaseShapes({f"{Q}.weight": (4, 1)}, layers={Q: (128, 128)})
    assert packed.linear(Q) == (128, 128) and packed.linear(f"{Q}x") is None
    wrong = {k: v[:, :-1] if k.endswith(f"{Q}.lora_A.weight") else v for k, v in tensors.items()}
    save_file({k: v.copy() for k, v in wrong.items()}, other / WEIGHTS)
    with pytest.raises(DoesNotFit, match="its shape does not fit the base"):
        inspect(other, shapes, max_rank=16)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("lm_head", "this adapter also changes lm_head"),
        ("model.embed_tokens", "this adapter also changes .*embed_tokens"),
        ("model.layers.0.mlp.experts.3.up_proj", "changes the experts of a mixture"),
        ("model.layers.0.attn.q_proj", f"no such linear layer; allowed: .*{Q}"),
        ("nothing.like.it", "no such linear layer; allowed: q_proj"),
    ],
)
def test_what_the_engine_cannot_adapt_is_refused_by_its_name(
    folders: Folders, tmp_path: Path, module: str, text: str
) -> None:
    other = copy(folders["lora"], tmp_path / "other")
    tensors = {k.replace(Q, module): v for k, v in load_file(other / WEIGHTS).items() if Q in k}
    save_file(tensors, other / WEIGHTS)
    config = json.loads((other / CONFIG).read_text())
    config["target_modules"] = [module.rsplit(".", 1)[-1]]
    (other / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DoesNotFit, match=text) as caught:
        inspect(other, BaseShapes({}, layers={Q: (128, 128)}), max_rank=16)
    assert module in str(caught.value)


def test_the_shapes_of_a_base_whose_weights_are_not_here_are_the_engines(
    models: Path, tmp_path: Path
) -> None:
    """A model that is named by its hub id: doctor has its small files only."""
    config = parse({"model": str(models / "base"), "adapters": {}}, Path("/"), {})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    shutil.copy(models / "base" / "config.json", folder)
    point = SimpleNamespace(checkpoint=SimpleNamespace(folder=folder))
    diagnosis: Any = SimpleNamespace(streams={"base": point})
    before = targets(config, diagnosis)["base"].shapes
    assert not before.whole and before.linear(Q) is None
    # As they come over the wire: lists.
    wire: Any = {"base": {Q: [128, 128]}}
    after = targets(config, diagnosis, wire)["base"].shapes
    assert after.whole and after.linear(Q) == (128, 128) and after.linear("lm_head") is None
