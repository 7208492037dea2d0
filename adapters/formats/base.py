"""The shapes of the base's weights, from its files' headers: an adapter must fit them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import BadAdapter
from adapters.formats.blocks import block_number
from adapters.formats.header import read_header

_INDEX = "model.safetensors.index.json"

_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc")}
"""model_type → layers whose weights are stored [in, out]."""

TABLES = (
    "embed_tokens", "embed_in", "embed_positions", "word_embeddings", "wte", "wpe", "lm_head",
    "embed_out",
)  # fmt: skip
"""Layers that are no linear map of hidden states: adapters for them are not served."""


@dataclass(frozen=True)
class BaseShapes:
    """The base's weights.

    Args:
        tensors: name in the checkpoint → shape as stored.
        conv1d: last names of layers whose weights are stored [in, out].
        layers: module → (out, in) of all layers that adapters can change, as the engine says it;
            None: where no engine is up, they are read from `tensors`.
        whole: whether a layer that is missing here is one that the base has not.
        vectors: whether the server takes adapters that change the outputs of decoder layers.
    """

    tensors: dict[str, tuple[int, ...]]
    conv1d: tuple[str, ...] = ()
    layers: Mapping[str, tuple[int, int]] | None = None
    whole: bool = True
    vectors: bool = True

    def linear(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer, None if none of this name is known."""
        if self.layers is not None:
            return self.layers.get(module)
        shape = self.tensors.get(f"{module}.weight", ())
        last = module.rsplit(".", 1)[-1]
        if len(shape) != 2 or last in TABLES:
            return None
        return (shape[1], shape[0]) if last in self.conv1d else (shape[0], shape[1])

    def offers(self, module: str) -> str:
        """The modules that this base has instead of a missing one, for a message."""
        names = list(self.layers or {}) or [
            name.removesuffix(".weight")
            for name in self.tensors
            if name.endswith(".weight") and self.linear(name.removesuffix(".weight"))
        ]
        names = [name for name in names if block_number(name) is None]
        near = difflib.get_close_matches(module, names, n=2, cutoff=0.7)
        kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
        return ", ".join(near or kinds)


def base_shapes(folder: Path) -> BaseShapes:
    """The shapes of a checkpoint in a local folder.

    Raises:
        BadAdapter: it has no readable safetensors files.
    """
    index = folder / _INDEX
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    tensors = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise BadAdapter("the base's file is missing", field=str(folder / name))
        tensors.update({k: info.shape for k, info in read_header(folder / name).items()})
    return BaseShapes(tensors, _stored_transposed(folder))


def plain_shapes(folder: Path) -> BaseShapes:
    """The shapes of a checkpoint's float matrices, which need no engine.

    Quantised layers are stored in other shapes, and an engine may know a layer under another name.

    Raises:
        BadAdapter: a file is broken.
    """
    tensors = {
        name: info.shape
        for file in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(file).items()
        if info.dtype in _FLOATS
    }
    return BaseShapes(tensors, _stored_transposed(folder), whole=False)


_FLOATS = ("F16", "BF16", "F32", "F64")


def _stored_transposed(folder: Path) -> tuple[str, ...]:
    model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    return _CONV1D.get(model_type, ())
