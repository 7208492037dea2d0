"""Linear sums by one product, against each stream's own scores in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from steering.worker.plan.layout import EXTRA, Layout
from steering.worker.plan.step_plan import Classes
from steering.worker.readout.one_product import one_product
from steering.worker.readout.parts import Vocabulary
from steering.worker.readout.readout import Readout

SIZE, PADDED = 96, torch.tensor([94, 95])


class Head(nn.Module):
    """An unembedding as vLLM's models have it, on one rank."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.quant_method = UnquantizedEmbeddingMethod()


class Model(nn.Module):
    """What the read-out needs of a language model."""

    def __init__(self, hidden: int, seed: int, dtype: torch.dtype, **processor: Any) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.lm_head = Head(torch.randn(SIZE, hidden, generator=rng).to(dtype))
        with set_current_vllm_config(VllmConfig()):
            self.logits_processor = LogitsProcessor(SIZE, **processor)
        self.square = False

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(hidden, self.lm_head.weight)
        cap = self.logits_processor.soft_cap
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        return scores**2 if self.square else scores * self.logits_processor.scale


def readout(models: Sequence[Model], dtype: torch.dtype, join: bool = True) -> Readout:
    layout = Layout(tuple(m.lm_head.weight.shape[1] for m in models), dtype)
    unembed = [m.compute_logits for m in models]
    sums = [list(range(1, len(models)))] if join else []
    one = one_product(layout, models, [True] * len(models), sums)
    none = [Vocabulary() for _ in models]
    return Readout(layout, unembed, none, PADDED, one_product=one)


def rows_of(layout: Layout, coef: np.ndarray) -> torch.Tensor:
    hidden = torch.randn(len(coef), layout.width, generator=torch.Generator().manual_seed(3))
    hidden = hidden.to(layout.dtype)
    hidden[:, sum(layout.sizes) :] = 0
    control = np.zeros((len(coef), layout.streams + EXTRA), np.float32)
    control[:, : layout.streams] = coef
    layout.write_control(hidden, torch.from_numpy(control))
    return hidden


def wanted(models: Sequence[Model], layout: Layout, hidden: torch.Tensor, coef: np.ndarray) -> Any:
    z = sum(
        torch.from_numpy(coef[:, i : i + 1]).double()
        * (hidden[:, layout.columns(i)].double() @ m.lm_head.weight.double().T)
        for i, m in enumerate(models)
    )
    assert isinstance(z, torch.Tensor)
    z[:, PADDED] = -torch.inf
    return z


COEF = np.array([[1, 0.8, -0.8], [1, -2.5, 0.3], [-0.5, 4, -4]], np.float32)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.6)])
def test_all_streams_side_by_side(dtype: torch.dtype, close: float) -> None:
    models = [Model(hidden, i, dtype) for i, hidden in enumerate((32, 64, 32))]
    mixer = readout(models, dtype)
    hidden = rows_of(mixer.layout, COEF)
    z = mixer.in_one(hidden, [True] * 3)
    assert z is not None
    assert z.dtype == torch.float32
    want = wanted(models, mixer.layout, hidden, COEF)
    assert torch.equal(z.isinf(), want.isinf())
    real = want.isfinite()
    assert z[real].double().numpy() == pytest.approx(want[real].numpy(), abs=close)
    general = mixer(hidden, Classes((True,) * 3))
    assert general is not None
    assert z[real].numpy() == pytest.approx(general.z[real].numpy(), abs=close)


@pytest.mark.parametrize("join", [False, True])
def test_a_twin_costs_no_table(join: bool) -> None:
    base = Model(32, 0, torch.float32)
    models = [base, Model(64, 1, torch.float32), base]
    mixer = readout(models, torch.float32, join)
    coef = COEF.copy()
    coef[:, 1] = 0
    hidden = rows_of(mixer.layout, coef)
    hidden[:, mixer.layout.columns(1)] = torch.nan
    z = mixer.in_one(hidden, [True, False, True])
    assert z is not None
    hidden[:, mixer.layout.columns(1)] = 0
    want = wanted(models, mixer.layout, hidden, coef)
    real = want.isfinite()
    assert z[real].double().numpy() == pytest.approx(want[real].numpy(), abs=1e-4)
    # The twin shares the base's block beside another stream too.
    whole = mixer.in_one(rows_of(mixer.layout, COEF), [True] * 3)
    assert (whole is None) == (not join)
    if whole is not None:
        want = wanted(models, mixer.layout, rows_of(mixer.layout, COEF), COEF)
        assert whole[real].double().numpy() == pytest.approx(want[real].numpy(), abs=1e-4)


def test_some_of_the_streams_take_the_general_path() -> None:
    mixer = readout([Model(32, i, torch.float32) for i in range(3)], torch.float32)
    hidden = rows_of(mixer.layout, COEF)
    assert mixer.in_one(hidden, [True, True, False]) is None


def test_a_vocabulary_that_lacks_ids_takes_the_general_path() -> None:
    mixer = readout([Model(32, i, torch.float32) for i in range(2)], torch.float32)
    lacking = Vocabulary(torch.tensor([3]), lacking=True)
    mixer = Readout(
        mixer.layout,
        mixer.unembed,
        [Vocabulary(), lacking],
        PADDED,
        one_product=mixer.one_product,
    )
    assert mixer.in_one(rows_of(mixer.layout, COEF[:, :2]), [True, True]) is None


@pytest.mark.parametrize("odd", [{"soft_cap": 30.0}, {"scale": 0.5}, {"square": True}, {"bias": 1}])
def test_only_plain_matrices_take_part(
    odd: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    square, bias = odd.pop("square", False), odd.pop("bias", 0)
    models = [Model(32, 0, torch.float32), Model(32, 1, torch.float32, **odd)]
    models[1].square = square
    if bias:
        models[1].lm_head.register_parameter("bias", nn.Parameter(torch.ones(SIZE)))
    layout = Layout((32, 32), torch.float32)
    one = one_product(layout, models, [True, True], [[1]])
    assert one is not None
    assert one.owner == (0, -1)
    assert not one.joined
    assert "no table for one product" in caplog.text
    assert one_product(layout, models[::-1], [True, True], [[1]]) is None


def test_heads_take_no_part() -> None:
    models = [Model(32, i, torch.float32) for i in range(2)]
    one = one_product(Layout((32, 32), torch.float32), models, [True, False], [])
    assert one is not None
    assert one.owner == (0, -1)
