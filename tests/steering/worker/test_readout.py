"""The read-out from hidden states to scores, over vocabularies that differ."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from steering.kernels.reference import mix_reference
from steering.plan import BASE, Recipe
from steering.worker.plan.layout import Layout
from steering.worker.plan.step_plan import Classes
from steering.worker.readout.parts import Vocabulary
from steering.worker.readout.readout import Readout

SIZE = 40
PADDED = torch.tensor([38, 39])
LACKING = torch.tensor([3, 36, 37, 38, 39])
NAMES = (BASE, "whole", "short")


def readout() -> tuple[Readout, list[torch.Tensor]]:
    """A base, a stream with the base's vocabulary, and one whose table ends before it."""
    rng = torch.Generator().manual_seed(2)
    tables = [torch.randn(rows, 8, generator=rng) for rows in (SIZE, SIZE, 36)]
    layout = Layout((8, 8, 8), torch.float32)
    vocabularies = [Vocabulary(), Vocabulary(PADDED), Vocabulary(LACKING, lacking=True)]
    unembed = [lambda h, t=t: h @ t.T for t in tables]
    return Readout(layout, unembed, vocabularies, PADDED), tables


def rows_of(coef: torch.Tensor, layout: Layout) -> torch.Tensor:
    hidden = torch.randn(len(coef), layout.width, generator=torch.Generator().manual_seed(4))
    control = np.zeros((len(coef), layout.width - sum(layout.sizes)), np.float32)
    control[:, : coef.shape[1]] = coef.numpy()
    layout.write_control(hidden, torch.from_numpy(control))
    return hidden


COEF = torch.tensor(
    [[1.0, 0, 0], [1, 0.5, -0.5], [1, 0, 0.8], [0, 1, 0], [0, 0.5, 0.5], [1, -2, 0]]
)


def test_rows_agree_with_the_definition_over_what_each_stream_shares() -> None:
    mixer, tables = readout()
    hidden = rows_of(COEF, mixer.layout)
    found = mixer(hidden, Classes.all(3))
    assert found is not None
    z, base = found.z, found.base
    for row, coef in enumerate(COEF.tolist()):
        scores = {}
        for i, name in enumerate(NAMES):
            own = (hidden[row, mixer.layout.columns(i)] @ tables[i].T).double().numpy()
            scores[name] = np.concatenate([own, np.full(SIZE - own.size, -np.inf)])
        assert base[row].numpy() == pytest.approx(scores[BASE], abs=1e-5)
        if coef == [1.0, 0, 0]:
            assert torch.equal(z[row], base[row])
            continue
        for name, lost in ((BASE, PADDED), ("whole", PADDED), ("short", LACKING)):
            scores[name][lost] = -np.inf
        want = mix_reference(Recipe(dict(zip(NAMES, coef, strict=True))), scores)
        assert np.isneginf(want[PADDED]).all()
        assert np.array_equal(np.isneginf(z[row].numpy()), np.isneginf(want))
        finite = np.isfinite(want)
        assert z[row].numpy()[finite] == pytest.approx(want[finite], abs=1e-4)


def test_a_stream_that_did_not_run_is_not_asked() -> None:
    mixer, _ = readout()
    hidden = rows_of(COEF[:1].repeat(2, 1), mixer.layout)
    hidden[:, mixer.layout.columns(2)] = float("nan")
    found = mixer(hidden, Classes((True, True, False)))
    assert found is not None
    assert torch.isfinite(found.z).all()


@pytest.mark.parametrize(("sums", "lacking"), [([0], False), ([5], True), ([2], True)])
def test_a_stream_that_ran_for_a_head_alone_is_not_asked(sums: list[int], lacking: bool) -> None:
    """No row sums its scores. Gathering nothing from several ranks ends vLLM's CPU workers."""
    mixer, tables = readout()

    def unembed(i: int, hidden: torch.Tensor) -> torch.Tensor:
        assert len(hidden)
        return hidden @ tables[i].T

    asked = [partial(unembed, i) for i in range(3)]
    strict = Readout(mixer.layout, asked, mixer.vocabularies, PADDED)
    hidden = rows_of(torch.tensor([[1.0, 0, 0], [1, 0, 0]]), mixer.layout)
    hidden = torch.cat([hidden, rows_of(COEF, mixer.layout)[sums]])
    want, found = (m(hidden, Classes((True, True, lacking))) for m in (mixer, strict))
    assert want is not None and found is not None
    assert torch.equal(found.z, want.z)


def test_an_unsteered_row_has_the_bases_bits_beside_steered_ones() -> None:
    mixer, _ = readout()
    hidden = rows_of(COEF, mixer.layout)
    found = mixer(hidden, Classes.all(3))
    assert found is not None
    assert torch.equal(found.z[0], found.base[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[0, 1, 3, 5], [1, 3, 5], [1, 5], [0], [5]])
def test_plain_sums_over_one_vocabulary_take_one_pass(rows: list[int], dtype: torch.dtype) -> None:
    mixer, tables = readout()
    unembed = [lambda h, t=t: (h @ t.T).to(dtype) for t in tables]
    mixer = Readout(mixer.layout, unembed, mixer.vocabularies, PADDED)
    coef = COEF[rows]
    hidden = rows_of(coef, mixer.layout)
    hidden[:, mixer.layout.columns(2)] = float("nan")  # did not run
    columns = [hidden[:, mixer.layout.columns(i)].contiguous() for i in range(2)]
    parts = [unembed[i](own).double() for i, own in enumerate(columns)]
    found = mixer(hidden, Classes((True, True, False)))
    assert found is not None
    z, base = found.z, found.base
    assert torch.equal(base, parts[0].to(dtype)) and z.dtype == torch.float32
    for row, (c, d, _) in enumerate(coef.tolist()):
        if (c, d) == (1, 0):
            assert torch.equal(z[row], parts[0][row].float())
            continue
        want = c * parts[0][row] + d * parts[1][row]
        want[PADDED] = float("-inf")
        torch.testing.assert_close(z[row].double(), want, atol=1e-5, rtol=1e-5)
