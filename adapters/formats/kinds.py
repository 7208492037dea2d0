"""How the layers of each of PEFT's kinds are read into parts; formulas as in peft 0.21.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from adapters.errors import BadAdapter
from adapters.formats.artefact import LARGEST_ALPHA, Part, Place
from adapters.formats.config import bad_key
from adapters.formats.header import TensorInfo
from adapters.formats.selectors import UNNAMED, Selectors, named_by

Found = dict[str, tuple[Place, TensorInfo]]
"""What a tensor is (an argument of `Part`) → where it lies."""

_MAX_RANK = 1 << 20
"""Beyond every matrix; what a server takes is `max_rank`."""

_EPSILON = 1e-5
"""PEFT adds it to AdaLoRA's rank."""


class Reader(Protocol):
    """Reads the layers of one adapter."""

    selectors: Selectors
    """What the config says of layers."""

    def part(self, module: str, tensors: Found) -> Part:
        """The part of one layer.

        Raises:
            BadAdapter: tensors are missing or have other shapes than the config says.
        """


class Lora:
    """LoRA, rsLoRA and DoRA, with or without biases of B.

    Args:
        config: the adapter's.
        shared: none of this kind.
    """

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    names = {
        "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "offset",
        "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    }  # fmt: skip

    def __init__(self, config: Mapping[str, Any], shared: Found) -> None:
        del shared
        self.selectors = Selectors(config, self.keys)
        self._rank = self.selectors.lookup("rank_pattern", config.get("r", 8))
        self._alpha = self.selectors.lookup("alpha_pattern", config.get("lora_alpha", 8))
        self._root = bool(config.get("use_rslora"))
        self._extra = {"magnitude": ("use_dora", bool(config.get("use_dora"))),
                       "offset": ("lora_bias", bool(config.get("lora_bias")))}  # fmt: skip

    def part(self, module: str, tensors: Found) -> Part:
        """As `Reader.part`."""
        rank = _rank(self._rank(module), "r")
        alpha = _number(self._alpha(module), "lora_alpha")
        part = _product(module, tensors, rank, alpha / (math.sqrt(rank) if self._root else rank))
        for field, (key, wanted) in self._extra.items():
            if wanted != (field in tensors):
                without = "its vector is missing" if wanted else "PEFT would drop its vector"
                raise BadAdapter(f"the config's {key} is {str(wanted).lower()}, and {without}",
                                 field=module)  # fmt: skip
        size = tensors["b"][1].shape[0]
        return replace(
            part,
            magnitude=_vector(tensors, "magnitude", size),
            offset=_vector(tensors, "offset", size),
        )


class AdaLora:
    """AdaLoRA: α / (r0 + 1e-5) · B (E ⊙ A); r0 is the rank at the start, whatever is left of it.

    Args:
        config: the adapter's.
        shared: none of this kind.
    """

    keys = Lora.keys
    names = {"lora_A": "a", "lora_B": "b", "lora_E": "inner"}

    def __init__(self, config: Mapping[str, Any], shared: Found) -> None:
        del shared
        self.selectors = Selectors(config, self.keys)
        self._start = _rank(config.get("init_r", 12), "init_r")
        self._alpha = _number(config.get("lora_alpha", 8), "lora_alpha")
        rank_pattern = config.get("rank_pattern") or {}
        if not isinstance(rank_pattern, dict):
            raise bad_key("rank_pattern", "not an object", rank_pattern)
        self._kept = {
            key.rsplit(".", 1)[0]: self._count(kept) for key, kept in rank_pattern.items()
        }

    def _count(self, kept: Any) -> int:
        right = isinstance(kept, list) and all(type(k) is bool for k in kept)
        if not right or len(kept) != self._start:
            raise bad_key("rank_pattern", f"not a list of {self._start} truth values", kept)
        return sum(kept)

    def part(self, module: str, tensors: Found) -> Part:
        """As `Reader.part`; an empty part where no rank is left."""
        rank = self._kept.get(module, self._start)
        alpha = self._alpha if self._alpha > 0 else float(rank)  # as PEFT does
        part = _product(module, tensors, rank, alpha / (self._start + _EPSILON))
        place, info = _needed(module, tensors, "inner", "lora_E")
        if info.shape != (rank, 1):
            raise _shape(place, info, f"({rank}, 1)")
        return replace(part, inner=place) if rank else Part()


class Vera:
    """VeRA: λ_b ⊙ B[:out] (λ_d ⊙ A[:, :in] x), with one A and one B for all layers.

    Args:
        config: the adapter's.
        shared: A and B.
    """

    keys = ("target_modules", "layers_to_transform", "layers_pattern")
    names = {"vera_lambda_b": "outer", "vera_lambda_d": "inner"}

    def __init__(self, config: Mapping[str, Any], shared: Found) -> None:
        self.selectors = Selectors(config, self.keys)
        if not config.get("save_projection", True):
            raise bad_key(
                "save_projection",
                "this adapter lacks its projections, which each machine may draw differently; "
                "train it with save_projection=True, or write it with PEFT's save_as_lora",
                False,
            )
        rank = _rank(config.get("r", 256), "r")
        self._part = replace(_product("base_model", shared, rank, 1.0, "vera"), shared=True)
        self._most = shared["b"][1].shape[0]

    def part(self, module: str, tensors: Found) -> Part:
        """As `Reader.part`."""
        size = _needed(module, tensors, "outer", "vera_lambda_b")[1].shape
        _needed(module, tensors, "inner", "vera_lambda_d")
        if len(size) != 1 or size[0] > self._most:
            raise _shape(*tensors["outer"], f"one number for each output, at most {self._most}")
        return replace(
            self._part,
            inner=_vector(tensors, "inner", self._part.rank),
            outer=_vector(tensors, "outer", size[0]),
        )


class Ia3:
    """IA3: l ⊙ (W x + b0), or W (l ⊙ x) + b0 for `feedforward_modules`.

    Args:
        config: the adapter's.
        shared: none of this kind.
    """

    keys = ("target_modules", "exclude_modules")
    names = {"ia3_l": "multiplier"}

    def __init__(self, config: Mapping[str, Any], shared: Found) -> None:
        del shared
        self.selectors = Selectors(config, self.keys)
        feedforward_modules = config.get("feedforward_modules")
        if feedforward_modules is None:
            raise bad_key("feedforward_modules", UNNAMED, feedforward_modules)
        self._inputs = named_by(feedforward_modules, "feedforward_modules", self.selectors.budget)

    def part(self, module: str, tensors: Found) -> Part:
        """As `Reader.part`."""
        place, info = tensors["multiplier"]
        axis = 0 if (inputs := self._inputs(module)) else 1
        if len(info.shape) != 2 or info.shape[axis] != 1:
            raise _shape(place, info, "(1, in), as feedforward_modules names it" if inputs else
                         "(out, 1), as feedforward_modules does not name it")  # fmt: skip
        return Part(inputs=place) if inputs else Part(multipliers=(place,))


KINDS: dict[str, type[Lora | AdaLora | Vera | Ia3]] = {
    "LORA": Lora, "ADALORA": AdaLora, "VERA": Vera, "IA3": Ia3,
}  # fmt: skip
"""peft_type → how it is read."""


def _product(module: str, tensors: Found, rank: int, scale: float, name: str = "lora") -> Part:
    for half, axis in (("a", 0), ("b", 1)):
        place, info = _needed(module, tensors, half, f"{name}_{half.upper()}")
        if len(info.shape) != 2 or info.shape[axis] != rank:
            raise _shape(place, info, f"rank {rank}", "its shape does not have the config's rank")
    return Part(tensors["a"][0], tensors["b"][0], 0, rank, scale)


def _needed(module: str, tensors: Found, field: str, name: str) -> tuple[Place, TensorInfo]:
    if field not in tensors:
        raise BadAdapter(f"{name} is missing", field=module)
    return tensors[field]


def _vector(tensors: Found, field: str, size: int) -> Place | None:
    if field not in tensors:
        return None
    place, info = tensors[field]
    if info.shape != (size,):
        raise _shape(place, info, f"({size},)")
    return place


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise bad_key(key, "not a rank", value, f"1 to {_MAX_RANK}")
    return value


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST_ALPHA:
        raise bad_key(key, "not a number", value, "finite numbers")
    return float(value)


def _shape(
    place: Place, info: TensorInfo, allowed: str, message: str = "its shape does not fit"
) -> BadAdapter:
    return BadAdapter(message, field=f"{place.file}: {place.name}",
                      value=info.shape, allowed=allowed)  # fmt: skip
