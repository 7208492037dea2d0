"""Heads in memory: hidden states → one number per row. Lives in the worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from adapters.errors import AdapterError, BadAdapter
from adapters.formats.artefact import Part
from adapters.formats.config import CONFIG, read_object
from adapters.formats.peft import read_peft
from adapters.parts import factors
from steering.heads import HeadError, HeadFile, Kind, Layer, Place, find_head, is_head
from steering.worker.readout.parts import Reading

Agreed = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Head(nn.Module):
    """A linear head or a small network, in float32 whatever the model's dtype is.

    Its tensors are buffers: vLLM looks for every parameter in the base's checkpoint.

    Args:
        file: where it lies.
        agreed: [R] as this rank computes it → the same numbers on every rank. The ranks' hidden
            states may differ in their last bits, and what is drawn must not.
    """

    def __init__(self, file: HeadFile, agreed: Agreed | None = None) -> None:
        super().__init__()
        self._agreed = agreed
        self._activation = _ACTIVATIONS[file.activation]
        self._depth = len(file.layers)
        for i, layer in enumerate(file.layers):
            weight, bias = _read(layer, file.rows if i == self._depth - 1 else "all")
            self.register_buffer(f"weight{i}", weight, persistent=False)
            self.register_buffer(f"bias{i}", bias, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R] float32 for hidden states [R, H]."""
        x = hidden.float()
        for i in range(self._depth):
            if i:
                x = self._activation(x)
            x = functional.linear(x, self.get_buffer(f"weight{i}"), self.get_buffer(f"bias{i}"))
        numbers = x[:, 0]
        return numbers if self._agreed is None else self._agreed(numbers)


def build(
    sources: Mapping[str, Mapping[str, str]],
    widths: Mapping[str, int],
    rows: int,
    agreed: Agreed | None = None,
) -> dict[str, Head]:
    """The heads by name.

    Args:
        sources: the streams beside the base, as `steering.engine_args.StreamSource` fields.
        widths: stream → columns of its hidden states.
        rows: of a head with a value for every token, the base's vocabulary.
        agreed: as in `Head`; None for one rank.

    Raises:
        HeadError: one is missing or does not fit.
    """
    heads = {}
    for name, source in sources.items():
        kind = source.get("head")
        if kind == "classifier" or kind == "value":
            width = widths[_body(name, source)]
            folder = Path(source.get("path") or source["model"])
            own_rows = rows if "path" not in source else None
            file = find_head(folder, cast("Kind", kind), width, own_rows)
            heads[name] = Head(file, agreed)
    return heads


def _body(name: str, source: Mapping[str, str]) -> str:
    return source.get("on", name)


def readings(
    sources: Mapping[str, Mapping[str, str]], names: Sequence[str], heads: Mapping[str, Head]
) -> list[Reading]:
    """The heads of `build` with the places of the streams that they read."""
    return [Reading(names.index(_body(n, sources[n])), head) for n, head in heads.items()]


def _read(layer: Layer, rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    if rows == "last":
        with safe_open(layer.weight.file, "pt") as file:
            weight = file.get_slice(layer.weight.name)[layer.weight.shape[0] - 1 :]
    else:
        weight = _tensor(layer.weight)
    weight = weight.float()
    bias = (
        torch.zeros(len(weight), dtype=torch.float32)
        if layer.bias is None
        else _tensor(layer.bias).float()
    )
    if rows == "difference":
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise HeadError(f"{layer.weight.name} in {layer.weight.file} is not finite")
    device = torch.get_default_device()
    return weight.contiguous().to(device), bias.to(device)


def _tensor(place: Place) -> torch.Tensor:
    with safe_open(place.file, "pt") as file:
        return file.get_tensor(place.name)


def body_weights(
    weights: Iterable[tuple[str, torch.Tensor]], folder: Path | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's weights without heads, a LoRA adapter merged in.

    Args:
        weights: (name, tensor) of the checkpoint.
        folder: where an adapter may lie; None: nowhere.

    Raises:
        HeadError: the adapter is of an unknown kind, or does not fit.
    """
    pending = _adapter(folder) if folder is not None else {}
    for name, tensor in weights:
        if is_head(name):
            continue
        delta = pending.pop(name.removesuffix(".weight"), None)
        if delta is None:
            yield name, tensor
            continue
        if delta.shape != tensor.shape:
            raise HeadError(f"the adapter changes {name} by {list(delta.shape)}; it has "
                            f"{list(tensor.shape)}")  # fmt: skip
        # Rounded only where it is copied into the model, whose type may be finer than the file's.
        yield name, tensor.float() + delta
    if pending:
        raise HeadError(f"the adapter in {folder} changes {min(pending)}, which the model lacks")


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Module → what a PEFT LoRA adds to its weight, float32."""
    if not (folder / CONFIG).is_file():
        return {}
    try:
        found = read_peft(folder, left_alone=lambda name: is_head(name) or is_head(f"{name}."))
        turned = bool(read_object(folder / CONFIG).get("fan_in_fan_out"))
        if not found.plain:
            raise BadAdapter(f"of kind {found.kind}, not a plain LoRA; merge it with PEFT's "
                             "merge_and_unload")  # fmt: skip
        return {m: _delta(folder, m, part, turned) for m, part in found.parts[0].items()}
    except AdapterError as error:
        raise HeadError(f"the adapter in {folder}: {error}") from error


def _delta(folder: Path, module: str, part: Part, turned: bool) -> torch.Tensor:
    a, b = factors(folder, part)
    delta = part.scale * (b.float() @ a.float())
    if not delta.isfinite().all():
        raise BadAdapter("is not finite", field=module)
    return delta.T if turned else delta
