"""What the settings of all recipes share: checks that name the flag, and what a run is known by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from adapters.training.errors import BadRecipe


class Checked:
    """Settings of a training run; a frozen dataclass."""

    dtype: str
    ELSEWHERE: ClassVar[frozenset[str]]
    """Fields that `deciding` leaves out: two runs may differ in them, or content is compared."""

    def _number(self, key: str, allowed: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, key)
        if not math.isfinite(value) or not fits(value):
            raise bad(key, value, allowed)

    def _check_dtype(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise bad("dtype", self.dtype, "float32, bfloat16")

    def deciding(self) -> dict[str, Any]:
        """The settings that a resumed run must share, JSON values."""
        names = [field.name for field in fields(self) if field.name not in self.ELSEWHERE]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names}


def bad(key: str, value: object, allowed: str) -> BadRecipe:
    """A setting that cannot be used, by its flag."""
    return BadRecipe("cannot be used", field=flag(key), value=value, allowed=allowed)


def flag(key: str) -> str:
    """A setting as the command line writes it: without the unit, and `lambda_` as `--lambda`."""
    return "--" + key.removesuffix("_s").rstrip("_").replace("_", "-")
