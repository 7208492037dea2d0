"""ITI's and LoFiT's changes of attention heads as our own folders; offline, see `convert`.

    …_head_wise.npy + labels + heads       ITI (arXiv 2306.03341): activations [n, L, H · D] and the
                                           labels [n] that they were gathered with
    directions.npy or .safetensors         ITI: directions [L, H, D], of probes or otherwise, with
                                           σ [L, H], or activations to compute it from
    a checkpoint with attn_A and attn_v    LoFiT (arXiv 2406.01563): [D] of each head

ITI adds α σ θ̂ to the input of a layer's output projection, in its head's place, from the prompt's
last token on: θ̂ is the direction at length 1, the mean of the true less the mean of the false
ones, and σ the standard deviation of the activations along it, as in honest_llama's `utils.py`
(MIT). LoFiT multiplies what is there by 1 + A and adds v.

Letters: n texts, L layers, H query heads, D the size of a head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adapters.errors import BadAdapter, BadSource
from adapters.formats.base import base_shapes
from adapters.formats.header import read_header
from adapters.tensors import TensorFile

Array = npt.NDArray[np.float64]
Tensors = dict[str, torch.Tensor]
Heads = Sequence[tuple[int, int]]
"""(layer, head), each counted from 0."""

FROM_LAST = {"prompt_last": 1, "from": 0}
"""Where ITI acts: at the last position of each pass of the authors' code."""

_LOFIT = re.compile(r"(.*\.(?:layers|h)\.(\d{1,4})\.[a-z_]+)\.attn_([Av])\.(\d{1,4})")
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")
_PLACE = re.compile(
    rf"(?:.*\.)?(?:layers|h)\.(\d+)\.(?:self_attn|attn|self_attention|attention)"
    rf"\.({'|'.join(_PROJECTIONS)})\.weight"
)
_USUAL = "model.layers.{}.self_attn.o_proj"


@dataclass(frozen=True)
class HeadFiles:
    """What stands beside the source.

    Args:
        labels: [n], 1 for true and 0 for false: directions are found from the activations.
        activations: [n, L, H · D], to find σ along directions that are given.
        heads: those to change, `layer:head,…` or a .npy file [K, 2]; None: all that are given.
        model: folder of the checkpoint that they are for: how many heads it has, and what it calls
            its layers. None: as Llama.
    """

    labels: Path | None = None
    activations: Path | None = None
    heads: str | None = None
    model: Path | None = None


def is_of_heads(source: Path) -> bool:
    """Whether a file or folder is one that this module reads."""
    if source.suffix == ".npy":
        return True
    return any(
        name in ("directions", "sigma") or _LOFIT.fullmatch(name)
        for file in _files(source)
        for name in _names(file)
    )


def from_heads(source: Path, files: HeadFiles) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of our format, and its config but for the kind and the scale.

    Raises:
        BadAdapter: a file is broken or has other shapes.
        BadSource: something is missing beside it, or does not belong.
    """
    if any(_LOFIT.fullmatch(name) for file in _files(source) for name in _names(file)):
        for name in ("labels", "activations"):
            if getattr(files, name) is not None:
                raise BadSource("LoFiT's checkpoints have none", field=f"--{name}")
        return _lofit(source, files)
    return _iti(source, files), {"where": FROM_LAST}


def read_heads(text: str) -> list[tuple[int, int]]:
    """Heads from `14:1,14:18`, or from a .npy file [K, 2].

    Raises:
        BadSource, BadAdapter: it is something else.
    """
    if text.endswith(".npy"):
        pairs = _array(Path(text))
        if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs != pairs.astype(int)).any():
            raise BadAdapter("not heads", field=text, value=pairs.shape, allowed="whole [K, 2]")
        return [(int(layer), int(head)) for layer, head in pairs]
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", part.strip())
        if match is None:
            raise BadSource("not heads", field="--heads", value=text,
                            allowed="layer:head,layer:head,… or a .npy file")  # fmt: skip
        found.append((int(match[1]), int(match[2])))
    return found


# --- ITI ------------------------------------------------------------------------------------------


def _iti(source: Path, files: HeadFiles) -> Tensors:
    heads = None if files.heads is None else read_heads(files.heads)
    if files.labels is not None:
        if heads is None:
            why = "which heads? ITI takes those whose probes are the best, 48 of Llama 7B's"
            raise BadSource(why, field="--heads", allowed="14:1,14:18,… or a .npy file")
        activations = _by_head(_array(source), source.name, files)
        directions = _mass_mean(activations, _array(files.labels), files.labels.name)
        sigma = _deviations(activations, directions)
    else:
        directions, sigma = _given(source, files)
    layers, count, size = directions.shape
    if heads is None:
        heads = [(int(n), int(h)) for n, h in np.argwhere(directions.any(-1))]
    shifts: dict[int, Array] = {}
    for n, h in heads:
        if n >= layers or h >= count:
            raise BadSource("no such head here", field="--heads", value=f"{n}:{h}",
                            allowed=f"layers to {layers - 1}, heads to {count - 1}")  # fmt: skip
        length = np.linalg.norm(directions[n, h])
        if not length > 0:
            raise BadAdapter("the direction of this head is 0", field=f"{source.name}: {n}:{h}")
        shift = shifts.setdefault(n, np.zeros((count, size)))
        shift[h] = sigma[n, h] * directions[n, h] / length
    if not shifts:
        raise BadAdapter("no head has a direction", field=source.name)
    places = _places(shifts, count * size, files.model)
    return {f"{places[n]}.shift": _tensor(shift, source.name) for n, shift in shifts.items()}


def _given(source: Path, files: HeadFiles) -> tuple[Array, Array]:
    """Directions [L, H, D], and σ [L, H] along them."""
    if source.suffix == ".npy":
        found: Mapping[str, Array] = {"directions": _array(source)}
    else:
        opened = TensorFile(source)
        found = {name: opened[name].double().numpy() for name in _names(source)}
    if "directions" not in found:
        raise BadAdapter("has no directions", field=source.name, allowed="directions, sigma")
    directions = found["directions"]
    if directions.ndim == 2:  # [L · H, D]
        directions = directions.reshape(-1, _heads_of(files.model), directions.shape[1])
    if directions.ndim != 3:
        raise BadAdapter("not directions of heads", field=source.name, value=directions.shape,
                         allowed="[L, H, D]")  # fmt: skip
    if files.activations is not None:
        activations = _by_head(_array(files.activations), files.activations.name, files,
                               directions.shape[1])  # fmt: skip
        if activations.shape[1:] != directions.shape:
            field = files.activations.name
            raise BadAdapter("does not fit the directions", field=field, value=activations.shape,
                             allowed=f"n of {directions.shape}")  # fmt: skip
        return directions, _deviations(activations, directions)
    if (sigma := found.get("sigma")) is None:
        raise BadSource("how far do activations vary along the directions? Give them, or a "
                        "safetensors file with `sigma` [L, H]", field="--activations")  # fmt: skip
    if sigma.shape != directions.shape[:2]:
        raise BadAdapter("does not fit the directions", field=f"{source.name}: sigma",
                         value=sigma.shape, allowed=f"{directions.shape[:2]}")  # fmt: skip
    return directions, sigma


def _by_head(activations: Array, name: str, files: HeadFiles, heads: int | None = None) -> Array:
    """[n, L, H, D] of the input of each layer's output projection."""
    if activations.ndim == 4:
        return activations
    count = heads or _heads_of(files.model)
    if activations.ndim != 3 or activations.shape[2] % count:
        raise BadAdapter("not activations of heads", field=name, value=activations.shape,
                         allowed=f"[n, L, {count} · D]")  # fmt: skip
    return activations.reshape(*activations.shape[:2], count, -1)


def _mass_mean(activations: Array, labels: Array, name: str) -> Array:
    """[L, H, D] mean of the true ones − mean of the false ones."""
    true = labels.reshape(-1) == 1
    if (
        true.size != len(activations)
        or not true.any()
        or true.all()
        or (set(np.unique(labels)) - {0, 1})
    ):
        raise BadAdapter("not a label for each text", field=name, value=labels.shape,
                         allowed=f"{len(activations)} of 0 and 1, some of each")  # fmt: skip
    found: Array = activations[true].mean(0) - activations[~true].mean(0)
    return found


def _deviations(activations: Array, directions: Array) -> Array:
    """[L, H] σ of the activations along each direction; 0 where there is none."""
    length = np.linalg.norm(directions, axis=-1, keepdims=True)
    unit = np.divide(directions, length, out=np.zeros_like(directions), where=length > 0)
    found: Array = np.einsum("nlhd,lhd->nlh", activations, unit).std(0)
    return found


# --- LoFiT ----------------------------------------------------------------------------------------


def _lofit(source: Path, files: HeadFiles) -> tuple[Tensors, dict[str, Any]]:
    model = files.model or (source if source.is_dir() else None)
    count = _heads_of(model)
    heads = None if files.heads is None else set(read_heads(files.heads))
    found: dict[tuple[int, str], Array] = {}
    size = 0
    for file in _files(source):
        opened = TensorFile(file)
        for name in sorted(_names(file)):
            if (match := _LOFIT.fullmatch(name)) is None:
                continue
            layer, part, head = int(match[2]), match[3], int(match[4])
            value = opened[name].double().flatten().numpy()
            size = size or len(value)
            if len(value) != size or head >= count:
                raise BadAdapter(
                    "does not fit the other heads",
                    field=f"{file.name}: {name}",
                    value=value.shape,
                    allowed=f"[{size}] of heads to {count - 1}",
                )
            if (heads is None or (layer, head) in heads) and value.any():
                own = found.setdefault((layer, part), np.zeros((count, size)))
                own[head] = value
    if not found:
        raise BadAdapter("no head of these is changed", field=source.name)
    places = _places({n for n, _ in found}, count * size, model)
    named = {"A": "heads", "v": "shift"}
    tensors = {f"{places[n]}.{named[part]}": _tensor(value, source.name)
               for (n, part), value in found.items()}  # fmt: skip
    return tensors, {"head_size": size}


# --- files ----------------------------------------------------------------------------------------


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(source.glob("*.safetensors"))
    return [source] if source.suffix == ".safetensors" and source.is_file() else []


def _names(file: Path) -> list[str]:
    return [*read_header(file)]


def _array(file: Path) -> Array:
    """A .npy file of numbers, float64; never a pickle."""
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadAdapter(f"not an array of numbers: {error}", field=file.name) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiub":
        raise BadAdapter("not an array of numbers", field=file.name)
    wide: Array = found.astype(np.float64)
    if not np.isfinite(wide).all():
        raise BadAdapter("has NaN or infinite values", field=file.name)
    return wide


def _tensor(value: Array, name: str) -> torch.Tensor:
    found = torch.from_numpy(value.reshape(-1)).float()
    if not found.isfinite().all():
        raise BadAdapter("has NaN or infinite values", field=name)
    return found


def _heads_of(model: Path | None) -> int:
    """H of a checkpoint."""
    if model is None:
        raise BadSource("how many heads has the model?", field="--model",
                        allowed="the folder of its checkpoint")  # fmt: skip
    try:
        config = json.loads((model / "config.json").read_bytes())
        count = config.get("text_config", config).get("num_attention_heads") or config["n_head"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadSource("its config names no attention heads", field="--model",
                        value=str(model)) from error  # fmt: skip
    return int(count)


def _places(layers: Iterable[int], width: int, model: Path | None) -> dict[int, str]:
    """Layer → its output projection, as the checkpoint names it.

    Raises:
        BadSource: the model has none of that width.
    """
    if model is None:
        return {n: _USUAL.format(n) for n in layers}
    shapes = base_shapes(model)
    found: dict[int, str] = {}
    for name in shapes.tensors:
        if match := _PLACE.fullmatch(name):
            found[int(match[1])] = name.removesuffix(".weight")
    for n in layers:
        size = shapes.linear(found[n]) if n in found else None
        if size is None or size[1] != width:
            raise BadSource("the model's layer has no output projection for these heads",
                            field="--model", value=f"{n}: {size and size[1]}",
                            allowed=f"{width} inputs")  # fmt: skip
    return {n: found[n] for n in layers}
