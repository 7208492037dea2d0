"""Vectors of other projects: where each one's layer n acts, and pickles that want to run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.convert import Request, convert, read_layers
from adapters.errors import BadAdapter, BadSource
from adapters.formats.artefact import Artefact
from adapters.formats.blocks import block
from adapters.formats.inspect import inspect, read_artefact
from adapters.load import load_set
from adapters.sets import AdapterSet, Member
from adapters.where import read_where
from server.main import run
from tests.adapters.test_vector_files import SHAPES, Blocks, constants

HIDDEN = 8


def vector(seed: int) -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_caa_acts_behind_the_layer_of_its_name(tmp_path: Path) -> None:
    for n in (1, 3):
        torch.save(vector(n), tmp_path / f"vec_layer_{n}_Llama-2-7b-chat-hf.pt")
    assert run(["convert-vectors", str(tmp_path), str(tmp_path / "all")]) == 0
    assert run(["convert-vectors", str(tmp_path / "vec_layer_3_Llama-2-7b-chat-hf.pt"),
                str(tmp_path / "one"), "--scale", "-2"]) == 0  # fmt: skip
    found = constants(tmp_path / "all")
    assert found.keys() == {block(1), block(3)}
    torch.testing.assert_close(found[block(3)], vector(3), atol=0, rtol=0)
    (only,) = constants(tmp_path / "one").items()
    assert only[0] == block(3)
    torch.testing.assert_close(only[1], -2 * vector(3), atol=0, rtol=0)


def test_ibm_s_directions_act_one_layer_before(tmp_path: Path) -> None:
    """They are added to the input of block n, which is the output of block n − 1."""
    file = tmp_path / "x.svec"
    directions = {str(n): vector(n).tolist() for n in range(4)}
    file.write_text(json.dumps({"model_type": "llama", "directions": directions}))
    convert(Request(file, tmp_path / "v", layers=read_layers("2-3")))
    found = constants(tmp_path / "v")
    assert found.keys() == {block(1), block(2)}
    torch.testing.assert_close(found[block(1)], vector(2))
    with pytest.raises(BadSource, match="embeddings"):
        convert(Request(file, tmp_path / "w"))
    with pytest.raises(BadSource, match="no such layer"):
        convert(Request(file, tmp_path / "w", layers=[9]))


def test_a_file_of_tensors(tmp_path: Path) -> None:
    torch.save({2: vector(2), 0: vector(0)[None].bfloat16()}, tmp_path / "many.pt")
    convert(Request(tmp_path / "many.pt", tmp_path / "many"))
    assert constants(tmp_path / "many").keys() == {block(0), block(2)}
    torch.save(vector(5), tmp_path / "one.pt")
    convert(Request(tmp_path / "one.pt", tmp_path / "one", layers=[2]))
    assert constants(tmp_path / "one").keys() == {block(2)}
    with pytest.raises(BadSource, match="one layer"):
        convert(Request(tmp_path / "one.pt", tmp_path / "w"))


def reft(folder: Path, layers: list[int], edits: int, name: str) -> dict[tuple[int, int], Any]:
    """A folder of pyreft's; (layer, edit) → its tensors."""
    folder.mkdir()
    kind = "<class 'pyreft.interventions.LoreftIntervention'>"
    config = {"representations": [[n, "block_output", "pos", 1, 3] for n in layers],
              "intervention_types": [kind] * len(layers) * edits}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    made = {}
    for n in layers:
        for k in range(edits):
            random = torch.Generator().manual_seed(10 * n + k)
            rotate, _ = torch.linalg.qr(torch.randn(HIDDEN, 3, generator=random))
            state = {"weight": torch.randn(3, HIDDEN, generator=random),
                     "bias": torch.randn(3, generator=random), "rotate_layer": rotate}  # fmt: skip
            torch.save(state, folder / name.format(n=n, k=k))
            made[n, k] = state
    return made


OLD = "intkey_layer_{n}_comp_block_output_unit_pos_nunit_1#{k}.bin"
NEW = "intkey_layer.{n}.comp.block_output.unit.pos.nunit.1#{k}.bin"


def check_edit(folder: Path, artefact: Artefact, n: int, state: dict[str, torch.Tensor]) -> None:
    """H + Rᵀ (W h + b − R h) with R = rotate_layerᵀ, as pyreft's forward has it."""
    found = AdapterSet.of([Member.of(artefact, artefact.digest(), "base")])
    made = {m: (a, b) for m, a, b in load_set(found, "base", torch.float32, Blocks(SHAPES))}
    a, b = (part.double() for part in made[block(n)])
    h = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shrunk = h @ a.T
    shrunk[:, found.layout("base").products :] = 1
    rotate, weight, bias = (state[k].double() for k in ("rotate_layer", "weight", "bias"))
    want = (h @ weight.T + bias - h @ rotate) @ rotate.T
    torch.testing.assert_close(shrunk @ b.T, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [OLD, NEW])
def test_loreft_shared_between_first_and_last(name: str, tmp_path: Path) -> None:
    states = reft(tmp_path / "reft", [0, 2], 1, name)
    out = tmp_path / "v"
    assert run(["convert-vectors", str(tmp_path / "reft"), str(out), "--positions", "f7+l7"]) == 0
    artefact = inspect(out, SHAPES, max_rank=8)
    assert artefact.modules == (block(0), block(2))
    assert artefact.where == (
        read_where({"prompt_first": 7, "prompt_last": 7, "halved": True}, "x"),
    )
    for n in (0, 2):
        check_edit(out, artefact, n, states[n, 0])


def test_loreft_with_an_edit_for_each_end(tmp_path: Path) -> None:
    states = reft(tmp_path / "reft", [1], 2, OLD)
    made = convert(Request(tmp_path / "reft", tmp_path / "v", positions="f5+l3"))
    ends = [{"prompt_first": 5, "halved": True}, {"prompt_last": 3, "halved": True}]
    for k, (folder, where) in enumerate(zip(made, ends, strict=True)):
        artefact = inspect(folder, SHAPES, max_rank=8)
        assert artefact.where == (read_where(where, "x"),)
        check_edit(folder, artefact, 1, states[1, k])
    for positions in (None, "f", "7", "l0", "f1"):
        with pytest.raises(BadSource, match="--positions"):
            convert(Request(tmp_path / "reft", tmp_path / "w", positions=positions))


class Evil:
    """Makes a file if it is unpickled by its own rules."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_nothing_of_a_pickle_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "vec_layer_1.pt").write_bytes(pickle.dumps(Evil(mark)))
    torch.save(Evil(mark), tmp_path / "x.pt")
    for file in ("vec_layer_1.pt", "x.pt"):
        with pytest.raises(BadAdapter, match="weights_only"):
            convert(Request(tmp_path / file, tmp_path / "v", layers=[1]))
    assert not mark.exists() and not (tmp_path / "v").exists()


@pytest.mark.parametrize(("change", "says"), [
    ({"rotate_layer": torch.ones(HIDDEN, 3)}, "orthonormal"),
    ({"rotate_layer.parametrizations.weight.original": torch.ones(HIDDEN, 3)}, "rotation"),
    ({"weight": torch.ones(2, HIDDEN)}, "shapes"),
    ({"more": torch.ones(2)}, "not LoReFT"),
])  # fmt: skip
def test_edits_that_are_none(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    states = reft(tmp_path / "reft", [1], 1, OLD)
    torch.save(states[1, 0] | change, tmp_path / "reft" / OLD.format(n=1, k=0))
    with pytest.raises(BadAdapter, match=says):
        convert(Request(tmp_path / "reft", tmp_path / "v", positions="f1"))


@pytest.mark.parametrize("value", [torch.ones(2, 8), torch.ones(8).long(), {"a": 1}, [1.0], {},
                                   torch.full((8,), torch.inf)])  # fmt: skip
def test_what_is_no_vector(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(BadAdapter):
        convert(Request(tmp_path / "x.pt", tmp_path / "v", layers=[1]))
    with pytest.raises(BadAdapter, match="no adapter"):
        read_artefact(tmp_path)
