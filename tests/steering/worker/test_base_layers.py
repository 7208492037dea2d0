"""What cannot be read through the base's layers is refused; the engine's tests read real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import RowParallelLinear

from adapters.errors import DoesNotFit
from adapters.sets import AdapterSet, Layout, Member
from steering.worker.adapting import base_layers
from steering.worker.adapting import sets as lora_sets

WEIGHT = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))


class Quantised:
    """A layer whose input is rounded with one scale for all (static), or one for each row."""

    def __init__(self, scale: float | None) -> None:
        self._scale = scale

    def apply(self, _: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127 if self._scale is None else self._scale
        return ((x / scale).round().clamp(-128, 127) * scale) @ WEIGHT.T


def layer(scale: float | None) -> Any:
    base = SimpleNamespace(
        quant_method=Quantised(scale), params_dtype=torch.float32, output_size=6, input_size=300
    )
    return SimpleNamespace(base_layer=base, device=torch.device("cpu"))


def test_rows_scaled_one_by_one_are_read_exactly() -> None:
    squares = sum(base_layers._squares(layer(None)))
    assert isinstance(squares, torch.Tensor)
    torch.testing.assert_close(squares.sqrt().float(), WEIGHT.norm(dim=1))


@pytest.mark.parametrize("scale", [0.3, 0.03, 0.004])
def test_a_fixed_scale_of_the_input_is_found(scale: float) -> None:
    with pytest.raises(DoesNotFit, match="fixed scale"):
        list(base_layers._squares(layer(scale)))


LAYOUT = AdapterSet.of([Member("base", "a", "", (2,), False, (True,), (True,))]).layout("base")


def adjusted(layout: Layout, b: torch.Tensor, **more: Any) -> torch.Tensor:
    found = b.clone()
    given = {"skip_bias_add": False, "bias": None, "tp_rank": 0, "tp_size": 2, **more}
    row = RowParallelLinear.__new__(RowParallelLinear)
    torch.nn.Module.__init__(row)
    for name, value in given.items():
        setattr(row, name, value)
    lora_sets._adjust(found, layout, row, "base: down_proj")
    return found


def test_one_rank_adds_the_constant_of_a_sum_of_ranks() -> None:
    b = torch.ones(5, LAYOUT.columns)
    assert torch.equal(adjusted(LAYOUT, b), b)
    other = adjusted(LAYOUT, b, tp_rank=1)
    assert other.sum(0).tolist() == [5, 5, 0, 5]  # products, constant, diagonal


def test_no_diagonal_where_the_bias_is_added_elsewhere() -> None:
    b, outside = torch.ones(5, LAYOUT.columns), {"skip_bias_add": True, "bias": torch.ones(5)}
    with pytest.raises(DoesNotFit, match="its bias is added elsewhere"):
        adjusted(LAYOUT, b, **outside)
    b[:, LAYOUT.sums] = 0  # another layer's diagonal
    assert torch.equal(adjusted(LAYOUT, b, **outside), b)
    b[:, LAYOUT.sums] = 1
    assert torch.equal(adjusted(LAYOUT, b, skip_bias_add=True, bias=None), b)
