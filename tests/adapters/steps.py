"""Sets of adapters of every kind, and steps whose requests use them in any way."""

from __future__ import annotations

import numpy as np
import torch

from adapters.kernels.lines import Lines
from tests.adapters.mixed import Ask, Layer, Part, Set, line

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of the largest value. The interpreter cuts bfloat16 off where a GPU rounds it."""

SETS: dict[int, Set] = {
    0: (Part((1,)),),
    1: (Part((3,)), Part((8,)), Part((5,))),
    2: (Part((2,)), Part((1, 3, 2, 2, 1), routed=True)),
    3: (Part((2, 2, 2), routed=True), Part((4,)), Part((1,) * 7, routed=True)),
}


def asked(random: np.random.Generator, parts: Set) -> list[Ask]:
    """What a request may ask of a set: any weight, also 0 and negative, any k and T."""
    return [
        Ask(
            float(random.choice([0.0, 1.0, 0.7, -1.3])),
            int(random.integers(1, len(part.ranks) + 1)) if part.routed else 0,
            float(random.choice([0.5, 1.0, 15.0])) if part.routed else 1.0,
        )
        for part in parts
    ]


def step(
    layer: Layer, tokens: int, requests: int, bare: float = 0.3
) -> tuple[Lines, list[list[Ask]]]:
    """Requests of all sets, whose tokens lie in any order; a share of them has no adapter."""
    slots = layer.random.choice(list(layer.sets), requests)
    asks = [asked(layer.random, layer.sets[slot]) for slot in slots]
    own = layer.random.integers(0, requests, tokens)
    own[layer.random.random(tokens) < bare] = -1
    made = tuple(line(layer.sets[slot], ask) for slot, ask in zip(slots, asks, strict=True))
    return Lines(made, slots.astype(np.int32), own.astype(np.int32)), asks
