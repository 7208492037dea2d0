"""How much memory adapters take before any is loaded."""

from __future__ import annotations

from pathlib import Path

from adapters.formats.base import BaseShapes
from server.checks.adapters import slot_bytes
from server.settings.file import parse


def test_every_place_takes_both_sides_of_every_linear_layer() -> None:
    adapters = {"max_loaded": 3, "max_rank": 60}
    shapes = BaseShapes({
        "model.layers.0.mlp.up_proj.weight": (5, 8), "model.embed_tokens.weight": (100, 8),
        "model.norm.weight": (8,),
    })  # fmt: skip
    for dtype, item in (("auto", 2), ("float32", 4)):
        config = parse({"model": "o/m", "adapters": adapters, "engine": {"dtype": dtype}},
                       Path("/"), {})  # fmt: skip
        assert config.adapters is not None
        # 60 rank indices take a slot of 64.
        assert slot_bytes(config, config.adapters, [shapes, shapes]) == 2 * 13 * 64 * 3 * item
