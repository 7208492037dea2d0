"""What adapters call the output of a decoder layer, by its number, in every family alike.

Between two decoder layers runs the residual stream; an adapter changes it as it changes a linear
layer whose weight is the identity. `layers[12]` is the output of the decoder layer 12, counted
from 0: what `transformers` gives as `hidden_states[13]`. No module of a checkpoint has such a name.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"layers\[(0|[1-9][0-9]{0,3})\]")

_PATH = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]*\.)*(0|[1-9][0-9]{0,3})")
"""A decoder layer's path in a checkpoint, or its number alone."""


def block(number: int) -> str:
    """The module's name of a decoder layer's output."""
    return f"layers[{number}]"


def block_number(module: str) -> int | None:
    """The number of a decoder layer's output; None for every other module."""
    found = _BLOCK.fullmatch(module)
    return int(found[1]) if found else None


def block_of(path: str) -> str | None:
    """The module's name for `12` or a path like `model.layers.12`; None for other texts."""
    found = _PATH.fullmatch(path)
    return block(int(found[1])) if found else None
