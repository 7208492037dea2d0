"""Facts about a model folder, read from its JSON and safetensors headers only."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.language import SERVED, renamed

_ITEM_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_HEADER_LIMIT = 100 * 1024 * 1024


class Unusable(Exception):
    """A checkpoint that cannot be a stream: one sentence says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model folder.

    Args:
        folder: where it lies.
        architecture: the first of `architectures` in config.json.
        parameters: numbers in its safetensors files (0 if they are not here yet).
        file_bytes: bytes of its tensors as stored.
        quantized: config.json has a quantization section.
        dtype: what config.json says, e.g. `bfloat16`.
        layers, heads, kv_heads, head_size: of its attention.
        hidden: width of its last hidden state.
        context: tokens that its positions reach, or None if config.json does not say.
        vocabulary: rows of its embedding table.
        encoder_decoder: a kind that cannot be a stream.
        multimodal: it reads more than text; the other numbers are its language part's.
    """

    folder: Path
    architecture: str
    parameters: int
    file_bytes: int
    quantized: bool
    dtype: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    context: int | None
    vocabulary: int
    encoder_decoder: bool
    multimodal: bool

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights once loaded.

        Args:
            dtype: the engine's, or `auto`.
        """
        return self.file_bytes if self.quantized else self.parameters * self.item_bytes(dtype)

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of the key-value cache for one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.item_bytes(dtype)

    def item_bytes(self, dtype: str) -> int:
        """Bytes per number; `auto` loads float32 checkpoints in two bytes, as vLLM does."""
        return 2 if dtype == "auto" else _ITEM_BYTES.get(dtype, 2)


def locate(model: str) -> Path:
    """The folder of a model; downloads the small files of a Hugging Face id that is not here.

    Raises:
        Unusable: no such folder, or the hub has no such model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise Unusable(f"no such folder: {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:  # not in the cache: ask the hub
        pass
    try:
        wanted = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:
        detail = str(error).split("\n")[0]
        raise Unusable(f"neither a folder nor a model on the hub: {model} ({detail})") from error


def inspect(model: str) -> Checkpoint:
    """Reads one model folder.

    Args:
        model: folder or Hugging Face id.

    Raises:
        Unusable: something is missing or malformed.
    """
    folder = locate(model)
    config = _config(folder)
    multimodal = config["architectures"][0] in SERVED
    parameters, file_bytes = _weights(folder, renamed if multimodal else None)
    shape = _language_shape(folder) if multimodal else config
    heads = _number(shape, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(shape, "hidden_size", "n_embd", "d_model")
    return Checkpoint(
        folder=folder,
        architecture=config["architectures"][0],
        parameters=parameters,
        file_bytes=file_bytes,
        quantized="quantization_config" in config,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        layers=_number(shape, "num_hidden_layers", "n_layer", "num_layers"),
        heads=heads,
        kv_heads=shape.get("num_key_value_heads") or heads,
        head_size=shape.get("head_dim") or (hidden // heads if heads else 0),
        hidden=_number(shape, "word_embed_proj_dim") or hidden,
        context=_context(shape),
        vocabulary=_number(shape, "vocab_size"),
        encoder_decoder=bool(config.get("is_encoder_decoder")),
        multimodal=multimodal,
    )


def _language_shape(folder: Path) -> dict[str, Any]:
    """The config of the language part, with the defaults that config.json leaves out."""
    from vllm.transformers_utils.config import get_config

    config: dict[str, Any] = get_config(str(folder), False).get_text_config().to_dict()
    return config


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise Unusable(f"no config.json in {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unusable(f"config.json in {folder} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise Unusable(f"config.json in {folder} is not an object")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise Unusable(f"config.json in {folder} names no architecture")
    return config


def _number(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    return 0


def _context(config: dict[str, Any]) -> int | None:
    """Tokens that the positions reach; rotary scaling stretches them."""
    reach = _number(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if reach and kind in ("linear", "dynamic", "yarn"):
        start = scaling.get("original_max_position_embeddings") or reach
        return max(reach, int(start * float(scaling.get("factor") or 1)))
    return reach or None


def _weights(folder: Path, named: Callable[[str], str | None] | None) -> tuple[int, int]:
    """(parameters, bytes) of the safetensors files.

    Args:
        folder: of the model.
        named: None for the names of tensors that are not loaded; without it all are.

    Raises:
        Unusable: there are none, or one is not whole.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if files and missing:
            raise Unusable(f"the weights in {folder} are not complete: {missing[0]} is missing")
    if not files:
        if index.is_file():
            return 0, 0  # a hub model whose weights are downloaded at start
        if any(next(folder.glob(kind), None) for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt")):
            raise Unusable(
                f"the weights in {folder} are pickles, which can run code when they are loaded: "
                "convert them to safetensors"
            )
        if ".cache" in str(folder) or "snapshots" in folder.parts:
            return 0, 0
        raise Unusable(f"no *.safetensors in {folder}")
    parameters = total = 0
    for file in files:
        count, size = _tensors(file, named)
        parameters, total = parameters + count, total + size
    return parameters, total


def _tensors(file: Path, named: Callable[[str], str | None] | None) -> tuple[int, int]:
    """(numbers, bytes) of one safetensors file, from its header."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("the header is too long")
            header = json.loads(stream.read(length))
        count = size = end = 0
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, behind = tensor["data_offsets"]
            end = max(end, behind)
            if named is None or named(name) is not None:
                count, size = count + math.prod(tensor["shape"]), size + behind - begin
        if 8 + length + end != file.stat().st_size:
            raise ValueError("it is cut short")
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error,
    ) as error:  # fmt: skip
        raise Unusable(f"{file} is not a whole safetensors file: {error}") from error
    return count, size
