"""Steering vectors of other projects as our own folders; offline, by someone who trusts the files.

    vec_layer_<n>….pt, alone or several in a folder   CAA (arXiv 2312.06681): [H] at the output of n
    ….pt                                              a tensor [H], or {n: [H]}: at the output of n
    ….svec                                            IBM activation-steering (JSON): acts at the
                                                      input of n, so at our n − 1
    two ….svec, one with a condition                  CAST (arXiv 2409.05907): kind `conditional`
    a folder with config.json and intkey_….bin        pyreft's LoReFT (arXiv 2404.03592)
    heads of ITI and LoFiT                            see `convert_heads`

Pickles are read with `torch.load(weights_only=True)`, which runs nothing of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.convert_heads import HeadFiles, from_heads, is_of_heads
from adapters.errors import BadAdapter, BadSource
from adapters.formats.config import read_object
from adapters.formats.vectors import CONFIG, TENSORS, read_vectors
from adapters.where import read_where

Tensors = dict[str, torch.Tensor]

_CAA = re.compile(r"vec_layer_(0|[1-9][0-9]{0,3})(?:_.*)?\.pt")
_REFT = re.compile(
    r"intkey_layer[_.](\d{1,4})[_.]comp[_.]block_output[_.]unit[_.]pos[_.]nunit[_.]\d+#(\d+)\.bin"
)
_POSITIONS = re.compile(r"(?:f([1-9]\d{0,5}))?\+?(?:l([1-9]\d{0,5}))?")
_MOST_JSON = 1 << 30
_ORTHONORMAL = 1e-2
"""How far R Rᵀ may be from the identity: bfloat16 leaves some 4e-3."""


@dataclass(frozen=True)
class When:
    """The condition under which vectors act.

    Args:
        source: file or folder of the condition's vectors, as of the vectors themselves.
        layers: numbers as the source counts them, ≥ 1 of them; one that is met is enough.
        above: met where the similarity is larger than this; None: see `below`.
        below: met where it is smaller.
        gate: `prompt` or `token`.
        read: of a prompt, `mean` or `last`.
        similarity: `projected` or `cosine`.
    """

    source: Path
    layers: Collection[int]
    above: float | None = None
    below: float | None = None
    gate: str = "prompt"
    read: str = "mean"
    similarity: str = "projected"

    def config(self, layers: Collection[int]) -> dict[str, Any]:
        """Its keys of our config, for our numbers of layers.

        Raises:
            BadSource: not exactly one threshold is given, or it is no similarity.
        """
        given = {"above": self.above, "below": self.below}
        own = {side: value for side, value in given.items() if value is not None}
        if len(own) != 1 or not all(-1 <= value <= 1 for value in own.values()):
            raise BadSource("a condition has one threshold", field="--above, --below",
                            value=own, allowed="one of them, −1 to 1")  # fmt: skip
        found: dict[str, Any] = {"gate": self.gate, "similarity": self.similarity}
        if self.gate == "prompt":
            found["read"] = self.read
        return found | {"conditions": {str(n): own for n in layers}}


@dataclass(frozen=True)
class Request:
    """What is to be converted.

    Args:
        source: a file or folder.
        out: our folder, which is made; where an effect of pyreft's differs between a prompt's first
            and last positions, two are made in it, `first` and `last`.
        layers: numbers as the source counts them; None: all.
        positions: of pyreft, e.g. `f7+l7`: its folders do not say them.
        scale: what the numbers are multiplied by when they are served.
        beside: more files, for ITI and LoFiT.
        when: the condition under which they act; None: always.
    """

    source: Path
    out: Path
    layers: Collection[int] | None = None
    positions: str | None = None
    scale: float = 1.0
    beside: HeadFiles = field(default_factory=HeadFiles)
    when: When | None = None


def convert(request: Request) -> list[Path]:
    """Writes the folders.

    Returns:
        Them.

    Raises:
        BadAdapter: files that are broken, or of a kind that is not known.
        BadSource: something stands at `out`, or an argument does not belong.
    """
    if request.out.exists():
        raise BadSource("there is something already", field=str(request.out),
                        allowed="a folder that does not exist yet")  # fmt: skip
    if not math.isfinite(request.scale):
        raise BadSource("not a finite number", field="--scale", value=request.scale)
    source = request.source
    if request.when is not None and (is_of_heads(source) or (source / "config.json").is_file()):
        raise BadSource("only constants behind decoder layers can have a condition",
                        field="--condition", value=str(request.when.source))  # fmt: skip
    if is_of_heads(source):
        return _from_heads(request)
    for name, given in vars(request.beside).items():
        if given is not None:
            raise BadSource("only for heads of ITI and LoFiT", field=f"--{name}", value=given)
    if (source / "config.json").is_file():
        return _from_pyreft(request)
    if request.positions is not None:
        raise BadSource("only pyreft's folders have positions of a prompt", field="--positions",
                        value=request.positions)  # fmt: skip
    found = dict(_directions(request))
    if not found:
        raise BadAdapter("no vectors here", field=str(source), allowed="vec_layer_<n>.pt, a .pt "
                         "file, an .svec file, a folder of pyreft")  # fmt: skip
    tensors = {str(n): v for n, v in found.items()}
    if (when := request.when) is None:
        _write(request.out, tensors, kind="vector", scale=request.scale)
        return [request.out]
    conditions = dict(_directions(Request(when.source, request.out, when.layers)))
    if not conditions:
        raise BadAdapter("no condition's vectors here", field=str(when.source))
    if early := sorted(n for n in found if n < max(conditions)):
        raise BadSource(
            "a vector acts before its condition is known, at the output of a layer",
            field="--layers", value=early[0], allowed=f"from {max(conditions)} on",
        )  # fmt: skip
    config = when.config(conditions)
    tensors |= {f"{n}.condition": vector for n, vector in conditions.items()}
    _write(request.out, tensors, kind="conditional", scale=request.scale, **config)
    return [request.out]


def read_layers(text: str) -> frozenset[int]:
    """Numbers from `13` or `15-23` or `3,15-23`.

    Raises:
        BadSource: it is something else.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            raise BadSource("not numbers of layers", field="--layers", value=text,
                            allowed="e.g. 13 or 15-23 or 3,15-23")  # fmt: skip
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def _directions(request: Request) -> Iterator[tuple[int, torch.Tensor]]:
    """(our layer, [H]) of the layers that are asked for."""
    source, layers = request.source, request.layers
    if source.is_dir():
        given = {int(m[1]): file for file in sorted(source.iterdir())
                 if (m := _CAA.fullmatch(file.name))}  # fmt: skip
        for n in _chosen(given, layers, source):
            yield n, _vector(_load(given[n]), given[n].name)
    elif source.suffix == ".svec":
        yield from _from_svec(source, layers)
    elif source.suffix in (".pt", ".pth", ".bin"):
        loaded = _load(source)
        if isinstance(loaded, torch.Tensor):
            match = _CAA.fullmatch(source.name)
            numbers = [int(match[1])] if match else sorted(layers or ())
            if len(numbers) != 1 or (layers is not None and set(layers) != set(numbers)):
                raise BadSource("one vector needs the one layer that it is for", field="--layers",
                                value=sorted(layers or ()), allowed="one number")  # fmt: skip
            yield numbers[0], _vector(loaded, source.name)
            return
        by_number = _numbered(loaded, source.name)
        for n in _chosen(by_number, layers, source):
            yield n, _vector(by_number[n], f"{source.name}: {n}")


def _chosen(given: Mapping[int, Any], layers: Collection[int] | None, source: Path) -> list[int]:
    if absent := sorted(set(layers or ()) - given.keys()):
        raise BadSource("the source has no such layer", field="--layers", value=absent[0],
                        allowed=", ".join(map(str, sorted(given))))  # fmt: skip
    return sorted(given if layers is None else layers)


def _from_svec(source: Path, layers: Collection[int] | None) -> Iterator[tuple[int, torch.Tensor]]:
    """Their `directions[n]` are added to what layer n reads: to the output of n − 1."""
    if source.stat().st_size > _MOST_JSON:
        raise BadAdapter("larger than 1 GiB", field=source.name)
    try:
        given = json.loads(source.read_bytes())["directions"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadAdapter("no file of activation-steering", field=source.name,
                         allowed='{"directions": {"<layer>": [numbers]}}') from error  # fmt: skip
    by_number = _numbered(given, source.name)
    for n in _chosen(by_number, layers, source):
        if n == 0:
            raise BadSource("direction 0 acts on the embeddings, before the first layer",
                            field="--layers", value=0,
                            allowed="layers from 1 on, e.g. --layers 15-23")  # fmt: skip
        try:
            values = torch.tensor(by_number[n], dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise BadAdapter("not a list of numbers", field=f"{source.name}: {n}") from error
        yield n - 1, _vector(values, f"{source.name}: {n}")


def _numbered(value: Any, name: str) -> dict[int, Any]:
    if not isinstance(value, dict) or not value:
        raise BadAdapter("no vectors by layer", field=name, value=type(value).__name__,
                         allowed="a tensor [H], or tensors by layer")  # fmt: skip
    found = {}
    for key, one in value.items():
        if not re.fullmatch(r"0|[1-9]\d{0,3}", str(key)):
            raise BadAdapter("not the number of a layer", field=name, value=key,
                             allowed="0 to 9999")  # fmt: skip
        found[int(key)] = one
    return found


def _load(file: Path) -> Any:
    """What a pickle holds; nothing of it is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises any class on a broken or hostile file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadAdapter(f"cannot be read with weights_only: {reason}", field=file.name) from error


def _vector(value: Any, name: str) -> torch.Tensor:
    """[H] float32."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise BadAdapter("not a tensor of numbers", field=name, value=type(value).__name__)
    value = value.squeeze(0) if value.dim() == 2 else value
    if value.dim() != 1:
        raise BadAdapter("not a vector", field=name, value=tuple(value.shape), allowed="[H]")
    if not value.isfinite().all():
        raise BadAdapter("has NaN or infinite values", field=name)
    return value.float().contiguous()


def _from_heads(request: Request) -> list[Path]:
    for name, given in (("--layers", request.layers), ("--positions", request.positions)):
        if given is not None:
            raise BadSource("heads are chosen by --heads; where they act is known", field=name)
    tensors, config = from_heads(request.source, request.beside)
    _write(request.out, tensors, kind="vector", scale=request.scale, **config)
    return [request.out]


# --- pyreft -------------------------------------------------------------------------------------


def _from_pyreft(request: Request) -> list[Path]:
    first, last = _positions(request.positions)
    config = read_object(request.source / "config.json")
    for kind in config.get("intervention_types") or ["none"]:
        if not re.search(r"\bLoreftIntervention\b", str(kind)):
            raise BadAdapter("cannot be converted", field="config.json: intervention_types",
                             value=kind, allowed="LoreftIntervention")  # fmt: skip
    places: dict[int, dict[int, Path]] = {}
    for file in sorted(request.source.glob("*.bin")):
        match = _REFT.fullmatch(file.name)
        if match is None:
            raise BadAdapter(
                "not an edit of a decoder layer's output",
                field=file.name,
                allowed="intkey_layer_<n>_comp_block_output_unit_pos_nunit_1#<k>.bin",
            )
        if request.layers is None or int(match[1]) in request.layers:
            places.setdefault(int(match[2]), {})[int(match[1])] = file
    edits = [places[k] for k in sorted(places)]
    if not edits or len(edits) > 2 or any(e.keys() != edits[0].keys() for e in edits):
        raise BadAdapter("its files are not one or two edits for each layer",
                         field=str(request.source))  # fmt: skip
    if len(edits) == 1:
        _write_reft(request.out, edits[0], request.scale, first, last)
        return [request.out]
    if not (first and last):
        raise BadSource("has an edit of its own for a prompt's first and for its last positions",
                        field="--positions", value=request.positions, allowed="f7+l7")  # fmt: skip
    _write_reft(request.out / "first", edits[0], request.scale, first, 0)
    _write_reft(request.out / "last", edits[1], request.scale, 0, last)
    return [request.out / "first", request.out / "last"]


def _positions(text: str | None) -> tuple[int, int]:
    """(first, last) of `f7+l7`."""
    match = _POSITIONS.fullmatch(text or "")
    if match is None or not (match[1] or match[2]):
        raise BadSource("a folder of pyreft does not say where it acts; give what it was trained "
                        "with", field="--positions", value=text,
                        allowed="f7+l7, f1, l1, …")  # fmt: skip
    return int(match[1] or 0), int(match[2] or 0)


def _write_reft(
    out: Path, files: Mapping[int, Path], scale: float, first: int, last: int
) -> None:  # fmt: skip
    tensors: Tensors = {}
    for n, file in files.items():
        for name, value in _edit(file).items():
            tensors[f"{n}.{name}"] = value
    where: dict[str, Any] = {"prompt_first": first, "prompt_last": last, "halved": True}
    where = {key: value for key, value in where.items() if value}
    read_where(where, "--positions")
    _write(out, tensors, kind="loreft", scale=scale, where=where)


def _edit(file: Path) -> Tensors:
    """Rotate [H, r], weight [r, H] and bias [r] of one of pyreft's state dicts."""
    state = _load(file)
    if not isinstance(state, dict):
        raise BadAdapter("not a state dict", field=file.name)
    if any("parametrizations" in str(key) for key in state):
        raise BadAdapter("holds what its rotation is computed from, not the rotation; save it with "
                         "pyreft's own save", field=file.name)  # fmt: skip
    if state.keys() != {"weight", "bias", "rotate_layer"}:
        raise BadAdapter("not LoReFT's tensors", field=file.name, value=sorted(map(str, state)),
                         allowed="weight, bias, rotate_layer")  # fmt: skip
    rotate, weight, bias = state["rotate_layer"], state["weight"], state["bias"]
    shapes = [tuple(t.shape) if isinstance(t, torch.Tensor) else () for t in (rotate, weight, bias)]
    hidden, rank = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    if not rank or shapes[1:] != [(rank, hidden), (rank,)]:
        raise BadAdapter("shapes of LoReFT's tensors", field=file.name, value=shapes,
                         allowed="[H, r], [r, H], [r]")  # fmt: skip
    wide = rotate.double()
    off = (wide.T @ wide - torch.eye(rank, dtype=torch.float64)).abs().max().item()
    if not off <= _ORTHONORMAL:
        raise BadAdapter("its rotation's columns are not orthonormal", field=file.name, value=off,
                         allowed=f"≤ {_ORTHONORMAL}")  # fmt: skip
    made = {"rotate": rotate, "weight": weight, "bias": bias}
    return {name: value.float().contiguous() for name, value in made.items()}


def _write(out: Path, tensors: Tensors, **config: Any) -> None:
    out.mkdir(parents=True)
    save_file(tensors, out / TENSORS)
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    read_vectors(out)
