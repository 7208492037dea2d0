"""An ordinary PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.artefact import LARGEST_ALPHA, Artefact, Part, inside
from adapters.formats.header import TensorInfo, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "trainable_token_indices", "target_parameters",
)  # fmt: skip
"""Features that change what an adapter computes and that are not served."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""`init_lora_weights` that leave the base's weights as they are."""

_MAX_CONFIG = 1 << 20

_MAX_RANK = 1 << 20
"""Beyond every matrix; what a server takes is `max_rank`."""


def read_peft(folder: Path, name: str = "adapter") -> Artefact:
    """The adapter in a folder; headers only.

    Args:
        folder: the adapter's own.
        name: what its one member is called.

    Raises:
        BadAdapter: files are missing or broken, a feature is not served, or a tensor does not
            belong.
    """
    config = read_config(inside(folder, CONFIG))
    _check_features(config)
    rank = _rank_of(config)
    scale = _scale_of(config)
    halves: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for tensor, info in read_header(inside(folder, WEIGHTS)).items():
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            raise BadAdapter("unexpected tensor", field=f"{WEIGHTS}: {tensor}")
        halves.setdefault(match[1], {})[match[2]] = (tensor, info)
    if not halves:
        raise BadAdapter("has no LoRA tensors", field=WEIGHTS)
    parts = {}
    for module, pair in halves.items():
        _check_targeted(config, module)
        parts[module] = _part(pair, module, rank(module), scale(module))
    return Artefact(folder, "lora", (name,), (parts,), {}, (CONFIG, WEIGHTS))


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB.

    Raises:
        BadAdapter: it is something else.
    """
    if path.stat().st_size > _MAX_CONFIG:
        raise BadAdapter("larger than 1 MiB", field=path.name)
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadAdapter(f"not JSON: {error}", field=path.name) from error
    if not isinstance(config, dict):
        raise BadAdapter("not a JSON object", field=path.name)
    return config


def _check_features(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise BadAdapter(
            "not a LoRA adapter",
            field=f"{CONFIG}: peft_type",
            value=config.get("peft_type"),
            allowed="LORA",
        )
    for feature in _REFUSED:
        if config.get(feature):
            raise BadAdapter(
                "this feature is not served", field=f"{CONFIG}: {feature}", value=config[feature]
            )
    if config.get("bias", "none") != "none":
        raise BadAdapter(
            "biases are not served", field=f"{CONFIG}: bias", value=config["bias"], allowed="none"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise BadAdapter(
            "this initialisation changes the base's weights: convert the adapter with PEFT first",
            field=f"{CONFIG}: init_lora_weights",
            value=init,
        )


def _rank_of(config: dict[str, Any]) -> Callable[[str], int]:
    patterns = _patterns(config, "rank_pattern")

    def rank(module: str) -> int:
        value = _lookup(patterns, module, config.get("r"))
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise BadAdapter("not a rank", field=f"{CONFIG}: r", value=value,
                             allowed=f"1 to {_MAX_RANK}")  # fmt: skip
        return value

    return rank


def _scale_of(config: dict[str, Any]) -> Callable[[str], float]:
    patterns = _patterns(config, "alpha_pattern")
    rank = _rank_of(config)

    def scale(module: str) -> float:
        alpha = _lookup(patterns, module, config.get("lora_alpha"))
        if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST_ALPHA:
            raise BadAdapter("not a number", field=f"{CONFIG}: lora_alpha", value=alpha,
                             allowed="finite numbers")  # fmt: skip
        r = rank(module)
        return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)

    return scale


def _patterns(config: dict[str, Any], key: str) -> dict[re.Pattern[str], Any]:
    """PEFT's rule: a key is a regular expression that matches the end of a module's name."""
    given = config.get(key) or {}
    field = f"{CONFIG}: {key}"
    if not isinstance(given, dict):
        raise BadAdapter("not an object", field=field, value=given)
    found = {}
    for pattern, value in given.items():
        # More than one could take exponential time on a hostile pattern.
        if len(re.findall(r"[*+?{]", pattern)) > 1:
            raise BadAdapter("more than one quantifier", field=field, value=pattern)
        try:
            found[re.compile(rf"(?:.*\.)?({pattern})$")] = value
        except (re.error, OverflowError, RecursionError) as error:
            raise BadAdapter(f"broken pattern: {error}", field=field, value=pattern) from error
    return found


def _lookup(patterns: dict[re.Pattern[str], Any], module: str, default: Any) -> Any:
    return next((v for p, v in patterns.items() if p.match(module)), default)


def _check_targeted(config: dict[str, Any], module: str) -> None:
    """PEFT silently drops tensors of modules that the config does not name; we refuse them."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # A regular expression, or a family such as all-linear.
    if not any(isinstance(t, str) and f".{module}".endswith(f".{t}") for t in targets):
        raise BadAdapter(
            "has tensors for a module that target_modules does not name",
            field=f"{WEIGHTS}: {module}",
            allowed=", ".join(map(str, targets)),
        )


def _part(pair: dict[str, tuple[str, TensorInfo]], module: str, rank: int, scale: float) -> Part:
    for half in "AB":
        if half not in pair:
            raise BadAdapter(f"lora_{half} is missing", field=f"{WEIGHTS}: {module}")
    (a, a_info), (b, b_info) = pair["A"], pair["B"]
    for tensor, info, axis in ((a, a_info, 0), (b, b_info, 1)):
        if len(info.shape) != 2 or info.shape[axis] != rank:
            raise BadAdapter(
                "its shape does not have the config's rank",
                field=f"{WEIGHTS}: {tensor}",
                value=info.shape,
                allowed=f"rank {rank}",
            )
    return Part(WEIGHTS, a, b, 0, rank, scale)
