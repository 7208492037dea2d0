"""The worker's Triton read-out against its torch path, from hidden states to scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from steering.plan import LayerKind, RuleKind
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import (
    ENDS,
    EXTRA,
    LAYERS,
    RULE_COUNT,
    RULE_HEAD,
    RULE_KIND,
    RULE_OPTIONS,
    RULE_PARAM,
    RULE_STREAM,
    Layout,
)
from steering.worker.plan.step_plan import Classes
from steering.worker.readout.parts import Reading, Vocabulary
from steering.worker.readout.readout import Readout
from steering.worker.readout.triton import TritonReadout, readout_class
from tests.steering.kernels.rows import RULES

SIZE, SHORT, HIDDEN, STREAMS, CANDIDATES = 1100, 1060, 8, 3, 4
PADDED = torch.arange(1090, SIZE)
LACKING = torch.tensor([5, 1050, *range(SHORT, SIZE)])
OWN = 700
"""A stop id of the requests of odd rows."""


def ends() -> EndSets:
    sets = EndSets([0, 1049], SIZE)
    sets.show([(), (OWN,)])
    return sets


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(dtype: torch.dtype, lacking: bool = True) -> tuple[Readout, TritonReadout]:
    """A base, a stream with a wider table, and one whose table ends before the base's."""
    rng = torch.Generator().manual_seed(2)
    sizes = (SIZE, SIZE + 30, SHORT if lacking else SIZE)
    tables = [torch.randn(rows, HIDDEN, generator=rng) for rows in sizes]
    probe = torch.randn(HIDDEN, generator=rng)
    last = Vocabulary(LACKING, lacking=True) if lacking else Vocabulary(PADDED)
    parts = (
        Layout((HIDDEN,) * STREAMS, torch.float32, CANDIDATES),
        [lambda h, t=t: (h @ t.T).to(dtype) for t in tables],
        [Vocabulary(), Vocabulary(PADDED), last],
        PADDED,
        (Reading(0, lambda h: h @ probe), Reading(2, lambda h: h @ probe)),
        ends(),
    )
    return Readout(*parts), TritonReadout(*parts)


def rows_of(layout: Layout, coef: np.ndarray, ruled: bool, valued: bool) -> torch.Tensor:
    """Hidden states with control, a row for each line of `coef`; NaN where a stream did not run."""
    rng = np.random.default_rng(len(coef))
    # The numbers must not depend on how wide the control is.
    hidden = torch.zeros(len(coef), layout.width)
    states = sum(layout.sizes)
    hidden[:, :states] = torch.tensor(rng.normal(size=(len(coef), 40))[:, :states])
    control = np.zeros((len(coef), STREAMS + EXTRA), np.float32)
    control[:, :STREAMS] = coef
    control[1::2, STREAMS + ENDS] = 1
    for row in range(len(coef) if ruled else 0):
        rule = RULES[row % len(RULES)]
        k = int(rng.choice(np.flatnonzero(coef[row])))
        if rule.kind is RuleKind.SELECT and np.count_nonzero(coef[row]) == 1:
            continue
        control[row, STREAMS + RULE_KIND], control[row, STREAMS + RULE_STREAM] = rule.kind, k
        control[row, STREAMS + RULE_PARAM] = rule.param or rng.choice([0.1, 0.5, 0.93])
        control[row, STREAMS + RULE_COUNT] = rule.count
        control[row, STREAMS + RULE_OPTIONS] = rule.options
        control[row, STREAMS + RULE_HEAD] = rng.integers(2)
    hidden[:, sum(layout.sizes) :] = 0
    layout.write_control(hidden, torch.from_numpy(control))
    if valued:
        some = torch.arange(0, len(coef), 4)
        ids = torch.tensor(rng.choice(np.arange(1, 1049), (len(some), CANDIDATES), replace=False))
        layout.write_additions(hidden, some, ids, torch.randn(ids.shape))
    for i in range(1, STREAMS):
        # Heads read stream 2 on any row.
        if i == 1:
            hidden[torch.tensor(coef[:, i]) == 0, layout.columns(i)] = torch.nan
    return hidden


def weights(rows: int) -> np.ndarray:
    """Rows of the base alone, rows without it, rows that use some streams."""
    rng = np.random.default_rng(7)
    coef = rng.normal(size=(rows, STREAMS)) * (rng.random((rows, STREAMS)) < 0.6)
    coef[~coef.any(1), 0] = 0.8
    coef[::5] = [1, 0, 0]
    return coef.astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lacking", [True, False])
@pytest.mark.parametrize(("ruled", "valued"), [(True, True), (False, False)])
def test_like_the_torch_path(dtype: torch.dtype, lacking: bool, ruled: bool, valued: bool) -> None:
    by_torch, by_triton = both(dtype, lacking)
    hidden = rows_of(by_torch.layout, weights(14), ruled, valued)
    classes = Classes.all(STREAMS, 2) if ruled else Classes((True,) * STREAMS)
    want = by_torch(hidden, classes)
    found = by_triton(hidden, classes)
    assert want is not None and found is not None
    assert torch.equal(found.base.float(), want.base.float())
    torch.testing.assert_close(found.z, want.z.float(), atol=2e-4, rtol=1e-5)
    if ruled:
        assert found.critical is not None and want.critical is not None
        torch.testing.assert_close(found.critical, want.critical)
    elif not lacking:
        assert torch.equal(found.z[0], want.base[0].float())


def test_a_stream_that_did_not_run_is_not_asked() -> None:
    by_torch, by_triton = both(torch.bfloat16)
    hidden = rows_of(by_torch.layout, np.tile([[0.7, 0, 0.3]], (3, 1)), False, False)
    classes = Classes((True, False, True))
    want, found = by_torch(hidden, classes), by_triton(hidden, classes)
    assert want is not None and found is not None
    torch.testing.assert_close(found.z, want.z, atol=2e-4, rtol=1e-5)


def test_scores_of_other_dtypes_are_widened() -> None:
    by_torch, _ = both(torch.bfloat16)
    unembed = list(by_torch.unembed)
    unembed[1] = both(torch.float32)[0].unembed[1]
    parts = (by_torch.layout, unembed, by_torch.vocabularies, PADDED, (), ends())
    hidden = rows_of(by_torch.layout, weights(5), False, False)
    want = Readout(*parts)(hidden, Classes((True,) * STREAMS))
    found = TritonReadout(*parts)(hidden, Classes((True,) * STREAMS))
    assert want is not None and found is not None
    torch.testing.assert_close(found.z, want.z, atol=2e-4, rtol=1e-5)


def test_chosen_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert readout_class() is Readout
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True, raising=False)
    assert readout_class() is TritonReadout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_over_layers(dtype: torch.dtype) -> None:
    """Rows of each beside plain ones; two taps, which one product reads out."""
    rng = np.random.default_rng(4)
    table = torch.tensor(rng.normal(size=(SIZE, HIDDEN)), dtype=torch.float32)

    def unembed(h: torch.Tensor) -> torch.Tensor:
        return (h @ table.T).to(dtype)

    layout = Layout((HIDDEN,) * STREAMS, torch.float32)
    parts = (layout, [unembed] * STREAMS, [Vocabulary(), *[Vocabulary(PADDED)] * 2], PADDED)
    by_torch, by_triton = (kind(*parts, taps=[[1, 2]]) for kind in (Readout, TritonReadout))
    kinds = [kind for kind in LayerKind for _ in range(3)]
    control = np.zeros((len(kinds), STREAMS + EXTRA), np.float32)
    for row, kind in enumerate(kinds):
        control[row, :STREAMS] = [1, -1, -1] if kind else [1, 0, 0.5 * (row % 2)]
        control[row, STREAMS + LAYERS :] = kind, 1.5, 5 * row
        if kind in (LayerKind.CONTRAST, LayerKind.CONTRAST_JSD):
            control[row, STREAMS + RULE_KIND] = RuleKind.PLAUSIBLE
            control[row, STREAMS + RULE_PARAM] = 0.1
    hidden = torch.zeros(len(kinds), layout.width)
    states = torch.tensor(rng.normal(size=(len(kinds), STREAMS * HIDDEN)))
    hidden[:, : STREAMS * HIDDEN] = states
    layout.write_control(hidden, torch.from_numpy(control))
    classes = Classes.all(STREAMS, taps=True)
    for reported in (None, torch.tensor([1, 4, 7, 10])):
        want, found = by_torch(hidden, classes, reported), by_triton(hidden, classes, reported)
        assert want is not None and found is not None
        torch.testing.assert_close(found.z, want.z, atol=2e-3, rtol=1e-5)
        if reported is not None:
            assert found.measures is not None and want.measures is not None
            for got, wanted in zip(found.measures, want.measures, strict=True):
                torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-5)
