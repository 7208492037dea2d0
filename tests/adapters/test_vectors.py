"""Steering vectors: their files, what is made of them, and where they act."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.errors import BadAdapter, DoesNotFit
from adapters.formats.base import BaseShapes, base_shapes
from adapters.formats.blocks import block, block_number, block_of
from adapters.formats.inspect import elements, inspect, read_artefact
from adapters.load import load_set
from adapters.sets import AdapterSet, Member
from adapters.where import EVERYWHERE, MANY, Where, read_where
from tests.adapters.kinds import make_base
from tests.adapters.layers import CheckpointLayers, loaded, with_parts
from tests.adapters.vectors import acts, changes_of_states, make_reft, make_vector, write
from tests.reference import fresh

HIDDEN = 8
SHAPES = BaseShapes({}, layers={block(n): (HIDDEN, HIDDEN) for n in range(4)})


def test_blocks_are_named_by_number() -> None:
    assert (
        block_of("12") == block_of("model.layers.12") == block_of("transformer.h.12") == block(12)
    )
    assert block_number(block(12)) == 12
    for text in ("model.layers.0.mlp", "", "012", "a..1", "-1", "1.5", "layers[1]", "12345"):
        assert block_of(text) is None or text == "1.5"
    assert block_number("model.layers.1") is None


class Blocks(CheckpointLayers):
    """The outputs of decoder layers alone."""

    def __init__(self) -> None:
        pass

    def linear(self, module: str) -> tuple[int, int] | None:
        return SHAPES.linear(module)


@pytest.mark.parametrize("make", [make_vector, make_reft])
def test_a_part_is_the_formula(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "v", HIDDEN, [0, 2], seed=3, scale=-1.5, where="reply")
    artefact = inspect(folder, SHAPES, max_rank=8)
    assert artefact.modules == (block(0), block(2))
    assert artefact.constants == (True,) and not artefact.diagonals
    assert artefact.where == (Where(stop=MANY),)
    found = AdapterSet.of([Member.of(artefact, artefact.digest(), "base")])
    h = torch.randn(5, HIDDEN, dtype=torch.float64)
    want = changes_of_states(folder)
    made = {m: (a, b) for m, a, b in load_set(found, "base", torch.float32, Blocks())}
    assert made.keys() == {block(0), block(2)}
    for number in (0, 2):
        a, b = (part.double() for part in made[block(number)])
        shrunk = h @ a.T
        shrunk[:, found.layout("base").products :] = 1
        torch.testing.assert_close(shrunk @ b.T, want[number](h), atol=1e-6, rtol=0)
    sizes = {"make_vector": 2 * HIDDEN, "make_reft": 2 * (2 * 3 * HIDDEN + 3)}
    assert elements(artefact) == sizes[make.__name__]


BROKEN: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = [
    ({"kind": "svec"}, {"1": (HIDDEN,)}, "kind"),
    ({"scale": "2"}, {"1": (HIDDEN,)}, "scale"),
    ({"more": 1}, {"1": (HIDDEN,)}, "more"),
    ({"where": "now"}, {"1": (HIDDEN,)}, "says no positions"),
    ({"where": {"after": ""}}, {"1": (HIDDEN,)}, "where"),
    ({}, {}, "no vectors"),
    ({}, {"1": (HIDDEN,), "model.layers.1": (HIDDEN,)}, "second vector"),
    ({}, {"model.layers": (HIDDEN,)}, "unexpected tensor"),
    ({"kind": "loreft"}, {"1": (HIDDEN,)}, "unexpected tensor"),
    ({"kind": "loreft"}, {"1.rotate": (HIDDEN, 2), "1.weight": (2, HIDDEN)}, "lacks one of"),
    ({"kind": "loreft"}, {"1.rotate": (HIDDEN,), "1.weight": (2, HIDDEN), "1.bias": (2,)},
     "not a matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "says"), BROKEN)
def test_what_is_no_vector_is_refused(
    config: dict[str, Any], tensors: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, {n: torch.ones(s) for n, s in tensors.items()}, **config)
    with pytest.raises(BadAdapter, match=says):
        read_artefact(folder)


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"9": (HIDDEN,)}, {}, "0 to 3"),
        ({"1": (HIDDEN + 1,)}, {}, "does not fit"),
        ({"1.rotate": (HIDDEN, 2), "1.weight": (3, HIDDEN), "1.bias": (2,)}, {"kind": "loreft"},
         "does not fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, {n: torch.ones(s) for n, s in tensors.items()}, **config)
    with pytest.raises(DoesNotFit, match=says):
        inspect(folder, SHAPES, max_rank=8)
    bare = make_vector(tmp_path / "bare", HIDDEN, [0], seed=1)
    with pytest.raises(DoesNotFit, match=r"adapters\.vectors"):
        inspect(bare, BaseShapes({}, layers={}, vectors=False), max_rank=8)


# --- attention heads --------------------------------------------------------------------------


def lofit(folder: Path, base: Path, *, alike: bool, **config: Any) -> tuple[Path, dict[str, Any]]:
    """LoFiT on two layers' heads: (folder, module → (A, v)); `alike`: over query heads that share a
    value.
    """
    random = torch.Generator().manual_seed(4)
    shapes = base_shapes(base)
    tensors: dict[str, torch.Tensor] = {}
    own: dict[str, Any] = {}
    for n in (0, 1):
        module = f"model.layers.{n}.self_attn.o_proj"
        into = shapes.linear(module)[1]  # type: ignore[index]
        values = shapes.linear(f"model.layers.{n}.self_attn.v_proj")[0]  # type: ignore[index]
        size = config.get("head_size") or into
        a = torch.randn(values, generator=random).view(-1, 1, min(size, values))
        scale = a.expand(-1, into // values, -1).reshape(-1).clone() if alike else torch.randn(
            into, generator=random)  # fmt: skip
        v = torch.randn(into, generator=random)
        tensors |= {f"{module}.heads": scale, f"{module}.shift": v}
        own[module] = scale.double(), v.double()
    return write(folder, tensors, **config), own


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_heads_are_scaled_and_shifted(architecture: str, tmp_path: Path) -> None:
    """LoFiT is z' = (1 + A) ⊙ z + v at the input of the output projection (arXiv 2406.01563)."""
    base = make_base(tmp_path / "base", architecture)
    if architecture == "llama":
        config = json.loads((base / "config.json").read_text())
        size = config["hidden_size"] // config["num_attention_heads"]
        folder, own = lofit(tmp_path / "v", base, alike=True, head_size=size)
    else:
        width = base_shapes(base).linear("transformer.h.0.attn.c_proj")[1]  # type: ignore[index]
        own = {
            f"transformer.h.{n}.attn.c_proj": tuple(torch.randn(2, width).double()) for n in (0, 1)
        }
        tensors = {
            f"{m}.{k}": t.float()
            for m, p in own.items()
            for k, t in zip(("heads", "shift"), p, strict=True)
        }
        folder = write(tmp_path / "v", tensors)
    want = fresh(base).double()
    for module, (a, v) in own.items():

        def scaled(_: Any, inputs: Any, a: Any = a, v: Any = v) -> Any:
            return ((1 + a.float().double()) * inputs[0] + v.float().double(),)

        want.get_submodule(module).register_forward_pre_hook(scaled)
    ids = torch.tensor([[5, 9, 30, 7, 12]])
    got = with_parts(base, loaded(folder, base))
    with torch.inference_mode():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, atol=1e-4, rtol=0)


def test_heads_that_share_a_value_are_refused_if_they_differ(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    folder, _ = lofit(tmp_path / "v", base, alike=False, head_size=size)
    with pytest.raises(DoesNotFit, match="share keys and values"):
        loaded(folder, base)
    other, _ = lofit(tmp_path / "w", base, alike=False)
    with pytest.raises(DoesNotFit, match="LoFiT"):
        loaded(other, base)


# --- where ------------------------------------------------------------------------------------

WHERES: list[Any] = [
    "all", "prompt", "reply", "last_prompt", {"from": 0}, {"from": 3}, {"first": 4},
    {"from": 2, "first": 5}, {"prompt_first": 3}, {"prompt_last": 2},
    {"prompt_first": 7, "prompt_last": 7, "halved": True}, {"prompt_first": 3, "halved": True},
    {"prompt_last": 1, "from": 0}, {"prompt_first": 2, "prompt_last": 3, "from": 1},
    {"prompt_first": MANY, "from": 0}, {"prompt_first": 0}, {"prompt_first": MANY, "from": 4},
]  # fmt: skip


@pytest.mark.parametrize("said", WHERES)
def test_where_is_read_word_by_word(said: Any) -> None:
    where = read_where(said, "where")
    for length in range(1, 24):
        positions = np.arange(length + 8)
        got = where.active(positions - length, np.full(positions.size, length))
        assert got.tolist() == [acts(said, p, length) for p in positions.tolist()], length
    assert where.everywhere == (said in ("all", {"prompt_first": MANY, "from": 0}))


@pytest.mark.parametrize("said", WHERES)
def test_what_may_be_shared_is_the_same_in_every_longer_prompt(said: Any) -> None:
    """And no less than that, where the prompt is not acted on from its end."""
    where = read_where(said, "where")
    for length, longer in product(range(1, 24), range(1, 40)):
        shared = where.shared(length)
        text = length + 12
        same = [acts(said, p, length) == acts(said, p, length + longer) for p in range(text)]
        assert all(same[: text if shared is None else shared]), (length, longer)
    if said in ("prompt", "reply", {"from": 3}):
        assert where.shared(20) == 20
    if said in ("all", {"prompt_first": 3}, {"prompt_first": 0}):
        assert where.shared(20) is None


@pytest.mark.parametrize(
    "said",
    ["end", "", None, 3, [], {}, {"from": -1}, {"from": 1.0}, {"from": True}, {"to": 3},
     {"halved": True}, {"halved": 1, "from": 2}, {"prompt_first": MANY + 1}],
)  # fmt: skip
def test_other_positions_are_refused(said: Any) -> None:
    with pytest.raises(BadAdapter, match="where"):
        read_where(said, "where")


def test_everywhere_is_the_default() -> None:
    assert read_where("all", "") == EVERYWHERE and EVERYWHERE.everywhere
