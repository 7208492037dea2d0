"""Rules over layers in torch against the definition, and the definition against the formulas."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from steering.kernels.layers import Tap, contrast, evolved
from steering.kernels.mix import Rules, mix
from steering.kernels.reference import divergence
from steering.kernels.reference import evolved as evolved_reference
from steering.plan import LayerKind, RuleKind
from tests.steering.kernels.layer_rows import PLAUSIBLE, LayerRows

CONTRASTS = (LayerKind.CONTRAST, LayerKind.CONTRAST_JSD)


def close(got: torch.Tensor, want: np.ndarray, atol: float = 2e-4) -> None:
    found = got.double().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(want))
    finite = np.isfinite(want)
    assert np.allclose(found[finite], want[finite], atol=atol)


def given(scores: list[torch.Tensor]) -> list[Tap | None]:
    """What gives the taps' scores, behind the base's."""
    return [None, *(partial(torch.Tensor.float, s) for s in scores)]


@pytest.mark.parametrize(("rows", "streams", "size"), [(6, 2, 63), (9, 5, 501), (8, 4, 1)])
@pytest.mark.parametrize("kinds", [CONTRASTS, CONTRASTS[:1]])
def test_contrast(kinds: tuple[LayerKind, ...], rows: int, streams: int, size: int) -> None:
    drawn = LayerRows.draw(rows, streams, size, kinds)
    base = drawn.base()
    others = [torch.tensor(s).float() for s in drawn.scores[1:]]
    jsd = torch.tensor([kind is LayerKind.CONTRAST_JSD for kind in drawn.kind])
    coef = torch.tensor(drawn.coef).float()
    taps = given(others)
    found = contrast(base, taps, coef, jsd)
    assert ((found.coef < 0).sum(1) == 1).all()
    line = torch.tensor([float(RuleKind.PLAUSIBLE), 0.0, PLAUSIBLE.param, 0.0, 0.0])
    z = mix([base, *others], found.coef, Rules.of(line.repeat(rows, 1)), lacking=False)
    z += found.shift[:, None]
    for row in range(rows):
        close(z[row], drawn.wanted(row, PLAUSIBLE))


def test_the_two_divergences_choose_differently() -> None:
    """Else `jsd` could be ignored."""
    rng = np.random.default_rng(1)
    differ = 0
    for _ in range(50):
        final = rng.normal(scale=3, size=40)
        early = [rng.normal(scale=s, size=40) for s in (1.0, 4.0, 9.0)]
        by = [
            int(np.argmax([divergence(final, one, jsd=jsd) for one in early]))
            for jsd in (False, True)
        ]
        differ += by[0] != by[1]
    assert differ > 5


def test_divergences_are_those_of_the_formulas() -> None:
    """As PyTorch computes them: the authors call `kl_div`, whose first argument is log q."""
    rng = np.random.default_rng(2)
    final, early = rng.normal(scale=3, size=(2, 30))
    p, q = (torch.tensor(s).softmax(0) for s in (final, early))
    mean = (p + q) / 2
    kl = torch.nn.functional.kl_div
    published = (kl(p.log(), mean, reduction="sum") + kl(q.log(), mean, reduction="sum")) / 2
    textbook = (kl(mean.log(), p, reduction="sum") + kl(mean.log(), q, reduction="sum")) / 2
    assert divergence(final, early, jsd=False) == pytest.approx(float(published))
    assert divergence(final, early, jsd=True) == pytest.approx(float(textbook))


@pytest.mark.parametrize(("rows", "streams", "size"), [(6, 2, 63), (9, 5, 501), (4, 3, 1)])
@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_evolved(rows: int, streams: int, size: int, rate: float) -> None:
    drawn = LayerRows.draw(rows, streams, size, (LayerKind.EVOLVE,))
    others = [torch.tensor(s).float() for s in drawn.scores[1:]]
    taps = given(others)
    top_k = [1 + 3 * row for row in range(rows)]
    z = evolved(
        drawn.base(),
        taps,
        torch.tensor(drawn.coef).float(),
        torch.full((rows,), rate),
        torch.tensor(top_k).float(),
        128,
    )
    for row in range(rows):
        from steering.plan import Rule

        close(z[row], drawn.wanted(row, Rule(), rate, top_k[row]), atol=1e-3)


def test_layers_that_point_nowhere_only_flatten() -> None:
    """All cosines ≤ 0: P is 0."""
    final = np.array([2.0, 1.0, 0.0, -1.0])
    found = evolved_reference(final, [final], 2.0, 2)
    assert found[0] - found[1] < 1.0
    assert found[2] < found[1] - 200


def test_random_bits_do_no_harm() -> None:
    rng = torch.Generator().manual_seed(3)
    base, tap = torch.randn(2, 20, 90, generator=rng)
    numbers = torch.randn(20, 3, generator=rng) * 1e30
    jsd = torch.arange(20) % 2 == 0
    assert contrast(base, [None, lambda: tap], numbers[:, :2], jsd).coef.shape == (20, 2)
    z = evolved(base, [None, lambda: tap], numbers[:, :2], numbers[:, 1], numbers[:, 2], 128)
    assert z.shape == (20, 90)
