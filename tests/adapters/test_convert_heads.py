"""ITI's and LoFiT's files: converted, they do what the authors' code does to a model, by hooks."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.convert import Request, convert
from adapters.convert_heads import HeadFiles, read_heads
from adapters.errors import AdapterError, BadAdapter, BadSource
from adapters.formats.vectors import read_vectors
from adapters.where import read_where
from server.main import run
from tests.adapters.layers import loaded, with_parts
from tests.models import make_model
from tests.reference import fresh

HEADS, SIZE, LAYERS = 4, 32, 2
CHOSEN = [(0, 1), (1, 0), (1, 3)]
ALPHA = 15.0
IDS = [[11, 40, 7, 93, 5], [61, 22, 8], [15, 33, 70, 71, 9, 4], [200, 31], [5, 90, 300], [77, 78]]
LABELS = np.array([1, 0, 1, 0, 0, 1])

Change = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, [T, H, D] what its heads give) → the same, changed."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", "llama", seed=1)


def hooked(base: Path, change: Change) -> Any:
    """A model whose heads' outputs are changed in front of o_proj, float64."""
    model: Any = fresh(base).double()
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, n=n: (change(n, args[0][0].view(-1, HEADS, SIZE)).flatten(1)[None],)
        )
    return model


def activations(base: Path) -> np.ndarray[Any, Any]:
    """[n, L, H · D] at each text's last token, as ITI's get_activations has them."""
    rows: list[list[np.ndarray[Any, Any]]] = []

    def keep(n: int, x: torch.Tensor) -> torch.Tensor:
        rows[-1].append(x[-1].flatten().float().numpy())
        return x

    model = hooked(base, keep)
    for ids in IDS:
        rows.append([])
        with torch.inference_mode():
            model(torch.tensor([ids]))
    return np.array(rows)


def iti(base: Path, direction: Callable[[np.ndarray[Any, Any], int, int], Any]) -> Any:
    """ITI word by word: α σ θ̂ at every position of a text, for the chosen heads."""
    seen = activations(base).reshape(len(IDS), LAYERS, HEADS, SIZE).astype(np.float64)
    moved = torch.zeros(LAYERS, HEADS, SIZE, dtype=torch.float64)
    for n, h in CHOSEN:
        theta = direction(seen, n, h)
        theta = theta / np.sqrt((theta**2).sum())
        along = seen[:, n, h] @ theta
        sigma = np.sqrt(((along - along.mean()) ** 2).mean())
        moved[n, h] = torch.from_numpy(ALPHA * sigma * theta)
    return hooked(base, lambda n, x: x + moved[n])


def mean_difference(seen: np.ndarray[Any, Any], n: int, h: int) -> Any:
    true = [one for one, label in zip(seen[:, n, h], LABELS, strict=True) if label]
    false = [one for one, label in zip(seen[:, n, h], LABELS, strict=True) if not label]
    return sum(true) / len(true) - sum(false) / len(false)


def same(base: Path, folder: Path, want: Any) -> None:
    """What is loaded of a folder gives the scores of the authors' hooks, and other ones than the
    model alone.
    """
    found, plain = with_parts(base, loaded(folder, base)), fresh(base).double()
    with torch.inference_mode():
        mine, theirs, alone = (m(torch.tensor([IDS[2]])).logits for m in (found, want, plain))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert (mine - alone).abs().max() > 1e-2


def test_iti_from_activations_labels_and_heads(base: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tqa_head_wise.npy", activations(base))
    np.save(tmp_path / "tqa_labels.npy", LABELS)
    np.save(tmp_path / "top_heads.npy", np.array(CHOSEN))
    for i, heads in enumerate((str(tmp_path / "top_heads.npy"), "0:1,1:0,1:3")):
        out = tmp_path / f"v{i}"
        assert run(["convert-vectors", str(tmp_path / "tqa_head_wise.npy"), str(out), "--labels",
                    str(tmp_path / "tqa_labels.npy"), "--heads", heads, "--model", str(base),
                    "--scale", str(ALPHA)]) == 0  # fmt: skip
        assert read_vectors(out).where == (read_where({"prompt_last": 1, "from": 0}, "x"),)
        same(base, out, iti(base, mean_difference))


@pytest.mark.parametrize("flat", [False, True])
def test_iti_from_directions_of_probes(base: Path, tmp_path: Path, flat: bool) -> None:
    """The weights of probes, of any length; σ from activations, or given."""
    weights = np.random.default_rng(4).standard_normal((LAYERS, HEADS, SIZE))
    np.save(tmp_path / "seen.npy", activations(base))
    np.save(tmp_path / "probes.npy", weights.reshape(-1, SIZE) if flat else weights)
    beside = HeadFiles(None, tmp_path / "seen.npy", "0:1,1:0,1:3", base)
    convert(Request(tmp_path / "probes.npy", tmp_path / "v", scale=ALPHA, beside=beside))
    want = iti(base, lambda _, n, h: weights[n, h])
    same(base, tmp_path / "v", want)
    only = np.zeros_like(weights)
    for n, h in CHOSEN:
        only[n, h] = weights[n, h]
    along = np.einsum("nlhd,lhd->nlh", activations(base).reshape(-1, LAYERS, HEADS, SIZE),
                      weights / np.linalg.norm(weights, axis=-1, keepdims=True))  # fmt: skip
    tensors = {"directions": torch.from_numpy(only), "sigma": torch.from_numpy(along.std(0))}
    save_file(tensors, tmp_path / "iti.safetensors")
    convert(Request(tmp_path / "iti.safetensors", tmp_path / "w", scale=ALPHA))
    same(base, tmp_path / "w", want)


def lofit(folder: Path, base: Path, a: torch.Tensor, v: torch.Tensor) -> Path:
    """A checkpoint with LoFiT's parameters beside the model's own, in several files."""
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    own = {
        f"model.layers.{n}.self_attn.attn_{part}.{h}": value[n, h].clone()
        for part, value in (("A", a), ("v", v))
        for n in range(LAYERS)
        for h in range(HEADS)
    }
    own["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(HEADS * SIZE, HEADS * SIZE)
    own["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(HEADS * SIZE, HEADS * SIZE)
    names = sorted(own)
    for i in range(2):
        save_file({name: own[name] for name in names[i::2]}, folder / f"model-{i}.safetensors")
    index = {name: f"model-{i}.safetensors" for i in range(2) for name in names[i::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_lofit_s_scales_and_offsets(base: Path, tmp_path: Path) -> None:
    """A is stored without the 1. Two query heads share a value in this base."""
    draw = torch.Generator().manual_seed(6)
    a, v = torch.zeros(LAYERS, HEADS, SIZE), torch.zeros(LAYERS, HEADS, SIZE)
    a[1, 2:] = 0.5 * torch.randn(SIZE, generator=draw)
    for n, h in CHOSEN:
        v[n, h] = 0.3 * torch.randn(SIZE, generator=draw)
    source = lofit(tmp_path / "lofit", base, a, v)
    assert run(["convert-vectors", str(source), str(tmp_path / "v")]) == 0
    assert not read_vectors(tmp_path / "v").where
    want = hooked(base, lambda n, x: (1 + a[n].double()) * x + v[n].double())
    same(base, tmp_path / "v", want)
    convert(Request(source, tmp_path / "w", beside=HeadFiles(heads="0:1")))
    assert [*loaded(tmp_path / "w", base)] == ["model.layers.0.self_attn.o_proj"]


def test_other_families_name_their_projection(tmp_path: Path) -> None:
    for family, name in (("opt", "model.decoder.layers.1.self_attn.out_proj"),
                         ("gpt2", "transformer.h.1.attn.c_proj")):  # fmt: skip
        model = make_model(tmp_path / family, family)
        heads = json.loads((model / "config.json").read_text())
        count = heads.get("num_attention_heads") or heads["n_head"]
        source, out = tmp_path / f"{family}.safetensors", tmp_path / f"v-{family}"
        save_file({"directions": torch.ones(2, count, 32), "sigma": torch.ones(2, count)}, source)
        convert(Request(source, out, beside=HeadFiles(heads="1:0", model=model)))
        assert [*loaded(out, model)] == [name]


@pytest.mark.parametrize(("source", "beside", "says"), [
    ("seen.npy", {"labels": "labels.npy"}, "which heads"),
    ("seen.npy", {"labels": "labels.npy", "heads": "0:1"}, "how many heads"),
    ("seen.npy", {"labels": "labels.npy", "heads": "0:9", "model": "base"}, "no such head"),
    ("seen.npy", {"labels": "labels.npy", "heads": "0-1", "model": "base"}, "not heads"),
    ("seen.npy", {"labels": "ones.npy", "heads": "0:1", "model": "base"}, "not a label"),
    ("seen.npy", {"labels": "seen.npy", "heads": "0:1", "model": "base"}, "not a label"),
    ("evil.npy", {"labels": "labels.npy", "heads": "0:1", "model": "base"}, "array of numbers"),
    ("probes.npy", {}, "how far"),
    ("probes.npy", {"activations": "labels.npy", "heads": "0:1"}, "not activations"),
    ("nan.npy", {}, "NaN"),
    ("narrow.safetensors", {"model": "base"}, "no output projection"),
    ("zero.safetensors", {}, "no head has a direction"),
    ("sigma.safetensors", {}, "has no directions"),
])  # fmt: skip
def test_what_cannot_be_converted(
    source: str, beside: dict[str, Any], says: str, base: Path, tmp_path: Path
) -> None:
    arrays: dict[str, Any] = {
        "seen": np.ones((6, LAYERS, HEADS * SIZE)), "labels": LABELS, "ones": np.ones(6),
        "probes": np.ones((LAYERS, HEADS, SIZE)), "nan": np.full((2, 2, 2), np.nan),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(np.ones(3)))
    for name, shape, value in (("narrow", (2, 2, 8), 1.0), ("zero", (2, 2, 8), 0.0)):
        save_file({"directions": torch.full(shape, value), "sigma": torch.ones(shape[:2])},
                  tmp_path / f"{name}.safetensors")  # fmt: skip
    save_file({"sigma": torch.ones(2, 2)}, tmp_path / "sigma.safetensors")
    files: dict[str, Any] = {key: tmp_path / value for key, value in beside.items()}
    files |= {"heads": beside.get("heads")} | ({"model": base} if "model" in beside else {})
    with pytest.raises(AdapterError, match=says):
        convert(Request(tmp_path / source, tmp_path / "v", beside=HeadFiles(**files)))
    assert not (tmp_path / "v").exists()


def test_heads_are_not_chosen_by_layers(base: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "probes.npy", np.ones((LAYERS, HEADS, SIZE)))
    with pytest.raises(BadSource, match="--layers"):
        convert(Request(tmp_path / "probes.npy", tmp_path / "v", layers=[1]))
    torch.save(torch.ones(8), tmp_path / "x.pt")
    with pytest.raises(BadSource, match="--heads"):
        convert(Request(tmp_path / "x.pt", tmp_path / "v", [1], beside=HeadFiles(heads="0:1")))
    with pytest.raises(BadAdapter, match="not heads"):
        read_heads(str(tmp_path / "probes.npy"))
