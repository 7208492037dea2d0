"""Names that an adapter may have for a layer, where vLLM's model renames the checkpoint's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models.utils import WeightsMapper

from adapters.errors import DoesNotFit
from steering.worker.adapting.layers import Slice, checkpoint_layers, fit

NAME = "language_model.model.layers.0.mlp.down_proj"


def manager_of(mapper: WeightsMapper | None) -> Any:
    """One layer of a stream `base`, whose model has these rules."""
    layer = SimpleNamespace(base_layer=SimpleNamespace(input_size=12, output_size=8))
    model = torch.nn.Module()
    model.config = SimpleNamespace()  # type: ignore[assignment]
    if mapper is not None:
        model.hf_to_vllm_mapper = mapper
    outer = torch.nn.Module()
    outer.base = model
    return SimpleNamespace(modules={f"base.{NAME}": layer}, packed_modules={}, model=outer)


@pytest.mark.parametrize(
    ("mapper", "names"),
    [
        (None, {NAME}),
        # Two prefixes of one model's checkpoints, as Gemma 3's with images have them.
        (WeightsMapper(orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "language_model.model.": "language_model.model.",
            "lm_head.": "language_model.lm_head."}),
         {NAME, "model.language_model.layers.0.mlp.down_proj"}),
        (WeightsMapper(orig_to_new_substr={".feed_forward.": ".mlp."}),
         {NAME, "language_model.model.layers.0.feed_forward.down_proj"}),
        (WeightsMapper(orig_to_new_suffix={".w2": ".down_proj"},
                       orig_to_new_prefix={"": "language_model."}),
         {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.w2"}),
    ],
)  # fmt: skip
def test_every_name_that_leads_to_a_layer_is_known(
    mapper: WeightsMapper | None, names: set[str]
) -> None:
    found = checkpoint_layers(manager_of(mapper), "base")
    assert found == dict.fromkeys(names, (8, 12))


def test_a_matrix_that_is_too_small_is_refused_and_not_copied_into_a_part_of_the_layer() -> None:
    layer = Slice(("base.x",), (8,), 12, layer="base.x")
    fit(layer, "base", "x", torch.zeros(2, 12), torch.zeros(8, 2))
    for a, b in ((torch.zeros(2, 11), torch.zeros(8, 2)), (torch.zeros(2, 12), torch.zeros(7, 2))):
        with pytest.raises(DoesNotFit, match=r"base: x: .*allowed: 8 out, 12 in"):
            fit(layer, "base", "x", a, b)
