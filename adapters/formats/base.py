"""What an adapter must fit: the shapes of the base's weights, from its files' headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import BadAdapter
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
    """

    tensors: dict[str, tuple[int, ...]]
    conv1d: tuple[str, ...] = ()

    def linear(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer, None if the base has no such layer."""
        shape = self.tensors.get(f"{module}.weight", ())
        last = module.rsplit(".", 1)[-1]
        if len(shape) != 2 or last in TABLES:
            return None
        return (shape[1], shape[0]) if last in self.conv1d else (shape[0], shape[1])


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
    model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    return BaseShapes(tensors, _CONV1D.get(model_type, ()))
