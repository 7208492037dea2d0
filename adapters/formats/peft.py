"""Adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, or shards.

LoRA (with rsLoRA, DoRA and biases), AdaLoRA, VeRA and IA3; tensors have the names of peft 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.artefact import Artefact, Kind, Part, Place, inside
from adapters.formats.config import CONFIG, bad_key, read_object
from adapters.formats.features import also_changes, check_kind, check_options
from adapters.formats.kinds import KINDS, Found, Reader
from adapters.formats.shards import INDEX, WEIGHTS, find_tensors, shards

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "read_peft", "shards"]

_PREFIX = "base_model.model."

_SHARED = {"base_model.vera_A": "a", "base_model.vera_B": "b"}

_WRAPPED_BIAS, _BIAS = ".base_layer.bias", ".bias"

_NAMES: dict[str, Kind] = {"LORA": "lora", "ADALORA": "adalora", "VERA": "vera", "IA3": "ia3"}

LeftAlone = Callable[[str], bool]


_MOST_INVOCATION = 256
"""Ids of an aLoRA's invocation."""


def _none(_: str) -> bool:
    return False


def read_peft(folder: Path, name: str = "adapter", left_alone: LeftAlone = _none) -> Artefact:
    """The adapter in a folder; headers only.

    Args:
        folder: the adapter's own.
        name: what its one member is called.
        left_alone: tensors, by their names in the base, and `modules_to_save` that are somebody
            else's business; they are no part of the artefact.

    Raises:
        BadAdapter: files are missing or broken, a feature is not served, or a tensor does not
            belong.
    """
    config = read_object(inside(folder, CONFIG))
    kind = check_kind(config)
    check_options(config, kind, left_alone)
    tensors, files = find_tensors(folder)
    layers: dict[str, Found] = {}
    shared: Found = {}
    for tensor, entry in tensors.items():
        plain = tensor.removeprefix(_PREFIX)
        if kind == "VERA" and tensor in _SHARED:
            shared[_SHARED[tensor]] = entry
        elif not left_alone(plain):
            module, what = _belongs(tensor, plain, kind, entry[0])
            layers.setdefault(module, {})[what] = entry
    reader = KINDS[kind](config, shared)
    parts = {module: _part(reader, module, entry) for module, entry in layers.items()}
    parts = {module: part for module, part in parts.items() if part != Part()}
    if not parts:
        raise BadAdapter("changes no layer", field=files[0])
    named: Kind = "dora" if config.get("use_dora") else _NAMES[kind]
    invocation = _invocation(config)
    return Artefact(folder, named, (name,), (parts,), {}, tuple(sorted((CONFIG, *files))),
                    invocation=invocation)  # fmt: skip


def _invocation(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids from whose last occurrence an aLoRA acts (arXiv 2504.12397); () for other adapters.

    Raises:
        BadAdapter: they are no ids, or something of the adapter acts in front of them too.
    """
    if (given := config.get("alora_invocation_tokens")) is None:
        return ()
    right = isinstance(given, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in given)
    if not right or not 1 <= len(given) <= _MOST_INVOCATION:
        raise bad_key("alora_invocation_tokens", "not token ids", given,
                      f"1 to {_MOST_INVOCATION} ids")  # fmt: skip
    for key in ("use_dora", "lora_bias", "bias"):
        if config.get(key) not in (None, False, "none"):
            raise bad_key(
                key, "an aLoRA acts from its invocation tokens on, and in PEFT this would not; "
                "train it without", config[key],
            )  # fmt: skip
    return tuple(given)


def _belongs(tensor: str, plain: str, kind: str, place: Place) -> tuple[str, str]:
    """(layer, what it is) of a tensor.

    Raises:
        BadAdapter: it is of something that is not served.
    """
    if plain != tensor:
        for suffix, what in KINDS[kind].names.items():
            if plain.endswith(f".{suffix}"):
                return plain.removesuffix(f".{suffix}"), what
        if plain.endswith(_WRAPPED_BIAS):
            return plain.removesuffix(_WRAPPED_BIAS), "wrapped_bias"
        if plain.endswith(_BIAS) and not _OTHERS.search(plain):
            return plain.removesuffix(_BIAS), "bias"
    raise BadAdapter(_stranger(tensor, plain, kind), field=f"{place.file}: {tensor}")


def _part(reader: Reader, module: str, tensors: Found) -> Part:
    """The part of one layer.

    Raises:
        BadAdapter: the config leaves the layer out, or tensors are missing or of other shapes.
    """
    plain, wrapped = tensors.pop("bias", None), tensors.pop("wrapped_bias", None)
    key = reader.selectors.left_out_by(module)
    if key and (tensors or wrapped):
        raise BadAdapter(
            f"has tensors for a layer that {key} leaves out, and PEFT drops them without a word; "
            "remove them, or correct the config",
            field=module,
        )
    if plain and not key:
        raise BadAdapter("PEFT drops the bias of an adapted layer that is not called "
                         f"{module}{_WRAPPED_BIAS}; rename it", field=plain[0].name)  # fmt: skip
    part = reader.part(module, tensors) if tensors else Part()
    if not (bias := plain or wrapped):
        return part
    if len(bias[1].shape) != 1:
        raise BadAdapter("not a bias", field=f"{bias[0].file}: {bias[0].name}",
                         value=bias[1].shape, allowed="one dimension")  # fmt: skip
    return replace(part, bias=bias[0])


_OTHERS = re.compile(
    r"\.(lora|vera|ia3|hada|lokr|oft|boft|hra|adamss|beft|c3a|deft|delora|fourierft|frod|glora|"
    r"gralora|hira|lily|ln_tuning|miss|osf|peanut|poly|psoft|pvera|randlora|road|shadow|shira|"
    r"supertuning|tinylora|unilora|vblora|waveft|trainable_tokens)_"
)
"""How the tensors of PEFT's kinds begin."""

_NAMED = re.compile(r"\.lora_(A|B|E|magnitude_vector)\..+")


def _stranger(tensor: str, plain: str, kind: str) -> str:
    """What a tensor says that the adapter does."""
    module = plain.rsplit(".", 1)[0]
    if tensor == plain:
        return f"not a name that PEFT gives a tensor: they begin with {_PREFIX}"
    if ".lora_embedding_" in plain:
        return also_changes(plain.split(".lora_embedding_")[0], "target_modules")
    if ".trainable_tokens_" in plain:
        module = plain.split(".trainable_tokens_")[0].removesuffix(".token_adapter")
        return also_changes(module, "trainable_token_indices")
    if plain.endswith(".base_layer.weight"):
        module = module.removesuffix(".base_layer")
        return also_changes(module, "target_modules, or save_embedding_layers")
    if kind in ("LORA", "ADALORA") and _NAMED.search(plain):
        return ("has the name of an adapter in it, as in a model's memory; write the adapter with "
                "PEFT's save_pretrained")  # fmt: skip
    if match := _OTHERS.search(plain):
        return f"is of another kind of adapter ({match[1]}) than the config's peft_type, {kind}"
    if plain.endswith(".weight"):
        return also_changes(module, "modules_to_save, or a vocabulary that was resized")
    return "unexpected tensor"
