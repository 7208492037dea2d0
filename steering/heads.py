"""Heads in checkpoints: where their tensors are and what shapes they have. Reads headers only.

Known formats, all safetensors:

- TRL `AutoModelForCausalLMWithValueHead`: `v_head.summary.{weight,bias}`, one row;
- sequence and token classifiers: `score.{weight,bias}` or `classifier.{weight,bias}`, one or two
  labels (of two, the second is the one that is meant);
- a folder of a head alone: `{weight,bias}`, or the layers `0.{weight,bias}`, `2.{weight,bias}`,
  … of a small network with `activation` in its config.json;
- Co-LLM: a language model whose unembedding has a row more than the base, its defer token.

PEFT's prefixes are ignored. Front end and worker; loads no torch.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["value", "classifier"]

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
"""Activations of networks with several layers."""

_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "value": ("v_head.summary", "score"),
    "classifier": ("score", "classifier"),
}
_TABLES = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
_TASKS = ("ForTokenClassification", "ForSequenceClassification")
_HEADER_LIMIT = 100 * 1024 * 1024
_NUMBERED = re.compile(r"(0|[1-9]\d{0,3})\.(weight|bias)")


class HeadError(Exception):
    """A head that cannot be served: one sentence says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor on disk: its file, its name there and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer: weight [out, in], bias [out] or None."""

    weight: Place
    bias: Place | None


@dataclass(frozen=True, slots=True)
class HeadFile:
    """A head as it lies on disk.

    Args:
        layers: one, or the layers of a small network, in order.
        activation: between the layers.
        rows: which output it gives: 'one', 'difference' (second label less first) or 'last'.
    """

    layers: tuple[Layer, ...]
    activation: str = "relu"
    rows: Literal["one", "difference", "last"] = "one"

    @property
    def width(self) -> int:
        """H, the hidden size that it reads."""
        return self.layers[0].weight.shape[1]


def find_head(folder: Path, kind: Kind, width: int, base_rows: int | None = None) -> HeadFile:
    """The head in a checkpoint folder.

    Args:
        folder: where the tensors are.
        kind: what is looked for.
        width: hidden size of the stream that it reads.
        base_rows: rows of the base's embedding table, if a Co-LLM row may be meant.

    Raises:
        HeadError: there is none, or it does not fit.
    """
    places = dict(_places(folder))
    found = _alone(folder, places) or _named(kind, places)
    if found is None and kind == "classifier" and base_rows is not None:
        found = _defer_row(places, base_rows)
    if found is None:
        looked = ", ".join(f"{name}.weight" for name in (*_NAMES[kind], ""))
        raise HeadError(f"no {kind} head in {folder} (looked for {looked.replace(' .', ' ')})")
    _check(found, kind, width)
    return found


def is_head(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a head, not to the body."""
    return _plain(name).startswith(("v_head.", "score.", "classifier."))


def body_architecture(architecture: str) -> str:
    """The language model that a classifier's architecture has as its body."""
    if architecture in {f"GPT2{task}" for task in _TASKS}:
        return "GPT2LMHeadModel"
    for task in _TASKS:
        if architecture.endswith(task):
            return architecture.removesuffix(task) + "ForCausalLM"
    return architecture


def is_classifier(architecture: str) -> bool:
    """Whether an architecture is a classifier's."""
    return architecture.endswith(_TASKS)


def _plain(name: str) -> str:
    """A tensor's name without PEFT's additions."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def _alone(folder: Path, places: Mapping[str, Place]) -> HeadFile | None:
    """A folder that holds a head and nothing else."""
    if "weight" in places:
        return HeadFile((Layer(places["weight"], places.get("bias")),))
    if "0.weight" not in places or not all(map(_NUMBERED.fullmatch, places)):
        return None
    numbers = sorted(int(n.split(".")[0]) for n in places if n.endswith(".weight"))
    layers = tuple(Layer(places[f"{n}.weight"], places.get(f"{n}.bias")) for n in numbers)
    return HeadFile(layers, _activation(folder))


def _activation(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("activation")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise HeadError(f"config.json in {folder} cannot be read: {error}") from error
    if name not in ACTIVATIONS:
        raise HeadError(f"config.json in {folder}: activation is one of {', '.join(ACTIVATIONS)}")
    return str(name)


def _named(kind: Kind, places: Mapping[str, Place]) -> HeadFile | None:
    for name in _NAMES[kind]:
        if f"{name}.weight" in places:
            layer = Layer(places[f"{name}.weight"], places.get(f"{name}.bias"))
            return HeadFile((layer,))
    return None


def _defer_row(places: Mapping[str, Place], base_rows: int) -> HeadFile | None:
    for name in _TABLES:
        if name in places:
            place = places[name]
            if len(place.shape) == 2 and place.shape[0] > base_rows:
                return HeadFile((Layer(place, None),), rows="last")
            return None
    return None


def _check(found: HeadFile, kind: Kind, width: int) -> None:
    reads = width
    for layer in found.layers:
        shape, name = layer.weight.shape, layer.weight.name
        if len(shape) != 2 or shape[1] != reads:
            raise HeadError(f"{name} has shape {list(shape)}; its input has {reads} numbers")
        if layer.bias is not None and layer.bias.shape != shape[:1]:
            raise HeadError(f"{layer.bias.name} has shape {list(layer.bias.shape)}; wanted "
                            f"{list(shape[:1])}")  # fmt: skip
        reads = shape[0]
    if found.rows == "last" or reads == 1:
        return
    if kind == "classifier" and reads == 2:
        object.__setattr__(found, "rows", "difference")
        return
    allowed = "1" if kind == "value" else "1 or 2"
    raise HeadError(f"{found.layers[-1].weight.name} gives {reads} numbers; allowed: {allowed}")


def _places(folder: Path) -> Iterator[tuple[str, Place]]:
    """(plain name, place) of every tensor in the folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise HeadError(f"no *.safetensors in {folder}")
    for file in files:
        for name, shape in header(file).items():
            yield _plain(name), Place(file, name, shape)


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of a safetensors file's tensors.

    Raises:
        HeadError: it is not whole.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("the header is too long")
            found: dict[str, Any] = json.loads(stream.read(length))
        found.pop("__metadata__", None)
        end = max((t["data_offsets"][1] for t in found.values()), default=0)
        if 8 + length + end != file.stat().st_size:
            raise ValueError("it is cut short")
        shapes = {name: tuple(map(int, t["shape"])) for name, t in found.items()}
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
        RecursionError, struct.error,
    ) as error:  # fmt: skip
        raise HeadError(f"{file} is not a whole safetensors file: {error}") from error
    if any(0 in shape for shape in shapes.values()):
        raise HeadError(f"{file} holds an empty tensor")
    return shapes
