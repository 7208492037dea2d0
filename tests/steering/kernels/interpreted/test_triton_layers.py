"""The choice of a tap in Triton against torch and the definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steering.kernels import layers as torch_layers
from steering.kernels.mix import Rules, mix
from steering.kernels.triton_layers import contrast
from steering.plan import LayerKind, RuleKind
from tests.steering.kernels.layer_rows import PLAUSIBLE, LayerRows
from tests.steering.kernels.test_layers import CONTRASTS, close, given

KINDS = (*CONTRASTS, LayerKind.NONE, LayerKind.EVOLVE)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "streams", "size"), [(6, 2, 63), (9, 5, 2100), (5, 3, 1)])
def test_contrast(rows: int, streams: int, size: int, dtype: torch.dtype) -> None:
    drawn = LayerRows.draw(rows, streams, size, KINDS, dtype)
    coef = torch.tensor(drawn.coef).float()
    logits = [torch.tensor(s).to(dtype) for s in drawn.scores]
    for i in range(1, streams):
        logits[i][coef[:, i] == 0] = torch.nan
    both = torch.stack([torch.tensor([float(k) for k in drawn.kind]), torch.zeros(rows)], 1)
    found = contrast(logits, coef, both[:, 0], drawn.marked)
    base, others = drawn.base(), [torch.tensor(s).float() for s in drawn.scores[1:]]
    jsd = torch.tensor([kind is LayerKind.CONTRAST_JSD for kind in drawn.kind])
    same = torch_layers.contrast(base, given(others), coef, jsd)
    line = torch.tensor([float(RuleKind.PLAUSIBLE), 0.0, PLAUSIBLE.param, 0.0, 0.0])
    z = mix([base, *others], found.coef, Rules.of(line.repeat(rows, 1)), lacking=False)
    z += found.shift[:, None]
    for row, of in enumerate(drawn.kind):
        if of not in CONTRASTS:
            assert torch.equal(found.coef[row], coef[row])
            assert found.shift[row] == 0
            continue
        assert torch.equal(found.coef[row], same.coef[row])
        close(z[row], drawn.wanted(row, PLAUSIBLE))


def test_a_stream_that_no_row_uses_may_be_left_out() -> None:
    drawn = LayerRows.draw(4, 3, 1100, CONTRASTS)
    drawn.coef[:, 1:] = [-1, 0]
    coef = torch.tensor(drawn.coef).float()
    logits = [torch.tensor(s).float() for s in drawn.scores]
    kind = torch.tensor([float(k) for k in drawn.kind])
    found = contrast([*logits[:2], None], coef, kind)
    assert torch.equal(found.coef, coef)
