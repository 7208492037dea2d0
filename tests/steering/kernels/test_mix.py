"""The torch mix against the float64 definition, over odd sizes and hostile inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.kernels.mix import Ends, measure, mix, nucleus
from steering.kernels.reference import measure_reference, mix_reference
from steering.plan import BASE, Recipe, Rule, RuleKind

STREAMS = (BASE, "one", "two")
HEAD = "critic"
TOLERANCE = 2e-4
"""float32 against float64 on scores of magnitude 10 to 100."""


def scores(rng: np.random.Generator, size: int, hostile: bool) -> np.ndarray:
    found = rng.normal(scale=4.0, size=size)
    if hostile and size > 2:
        found[rng.integers(size, size=max(1, size // 20))] = -np.inf
        found[0] = 1.0
    return found


def recipe(rng: np.random.Generator, kind: RuleKind) -> Recipe:
    weights = {s: float(rng.normal()) for s in STREAMS if s == BASE or rng.random() < 0.7}
    if len(weights) == 1:
        weights["two"] = 1.0
    stream = str(rng.choice(list(weights)))
    param = float(rng.choice([0.05, 0.5, 0.9, 1.0]))
    return Recipe(weights, Rule(kind, stream, param, HEAD))


@pytest.mark.parametrize("size", [1, 63, 500, 32_003])
@pytest.mark.parametrize("hostile", [False, True], ids=["finite", "minus-infinity"])
def test_every_row_agrees_with_the_definition(size: int, hostile: bool) -> None:
    rng = np.random.default_rng(size + hostile)
    rows = 18
    recipes = [recipe(rng, RuleKind(row % len(RuleKind))) for row in range(rows)]
    values = {s: np.stack([scores(rng, size, hostile) for _ in range(rows)]) for s in STREAMS}
    coef = torch.tensor([[r.weights.get(s, 0.0) for s in STREAMS] for r in recipes])
    # A stream that a row does not use may hold anything.
    tensors = [torch.tensor(values[s], dtype=torch.float32) for s in STREAMS]
    for i, tensor in enumerate(tensors):
        tensor[coef[:, i] == 0] = float("nan")
    # Not contiguous, as slices of a wider buffer are not.
    strided = [torch.cat([t, t], 1)[:, : t.shape[1]] for t in tensors]
    ends = [] if size == 1 else [0, size // 2]
    table = torch.zeros(1, size, dtype=torch.bool)
    table[0, ends] = True
    log_odds = rng.normal(scale=3.0, size=rows)
    found = mix(
        strided,
        coef,
        torch.tensor([float(r.rule.kind) for r in recipes]),
        torch.tensor([float(STREAMS.index(r.rule.stream)) for r in recipes]),
        torch.tensor([r.rule.param for r in recipes]),
        critical=torch.tensor(log_odds, dtype=torch.float32),
        ends=Ends(table, torch.zeros(rows)) if ends else None,
    )
    for row, asked in enumerate(recipes):
        heads = {HEAD: log_odds[row : row + 1]}
        want = mix_reference(asked, {s: values[s][row] for s in STREAMS} | heads, ends)
        got = found[row].double().numpy()
        assert np.array_equal(np.isneginf(got), np.isneginf(want)), asked
        finite = np.isfinite(want)
        assert np.allclose(got[finite], want[finite], atol=TOLERANCE), asked


def test_plain_sums_skip_the_rules() -> None:
    logits = [torch.randn(4, 10) for _ in range(2)]
    coef = torch.tensor([[1.0, 0.5]]).expand(4, 2)
    none = torch.zeros(4)
    assert torch.equal(mix(logits, coef, None, none, none), mix(logits, coef, none, none, none))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = torch.Generator().manual_seed(3)
    logits = [torch.randn(6, 101, generator=rng) for _ in range(3)]
    coef = torch.randn(6, 3, generator=rng)
    kind = torch.tensor([0.0, 1, 2, 3, 4, 3])
    stream = torch.tensor([0.0, 0, 1, 2, 1, 0])
    param = torch.full((6,), 0.5)
    odds, table = torch.tensor([0.0, 0, 0, 2, 1, -2]), torch.arange(101)[None] == 7
    ends = Ends(table, torch.zeros(6))
    together = mix(logits, coef, kind, stream, param, critical=odds, ends=ends)
    for row in range(6):
        one = slice(row, row + 1)
        alone = mix(
            [s[one] for s in logits], coef[one], kind[one], stream[one], param[one],
            critical=odds[one], ends=Ends(table, torch.zeros(1)),
        )  # fmt: skip
        assert torch.equal(alone[0], together[row])


def test_an_id_is_in_the_nucleus_if_the_mass_before_it_is_below_p() -> None:
    """Four ids of a quarter each, exactly: with p = ½ the third has all of p before it."""
    inside = nucleus(torch.zeros(3, 4), torch.tensor([0.5, 0.51, 0.25]))
    assert inside.sum(-1).tolist() == [2, 3, 1] and inside[:, 0].all()


def test_a_critical_token_is_no_end_however_likely_that_is() -> None:
    scores = torch.tensor([[300.0, 1.0, 3.0, 2.0]])
    half, one = torch.tensor([0.5]), torch.ones(1)
    found = mix(
        [torch.zeros(1, 4), scores],
        torch.ones(1, 2),
        torch.tensor([float(RuleKind.CRITICAL)]),
        one,
        half,
        critical=one,
        ends=Ends(torch.tensor([[True, False, False, False]]), torch.zeros(1)),
    )
    assert found.softmax(-1)[0].tolist() == pytest.approx([0, 0, 1, 0], abs=1e-25)
    assert found[0, 1:].argsort(descending=True).tolist() == [1, 2, 0]


def test_measures_agree_with_the_definition() -> None:
    rng = np.random.default_rng(6)
    z, base = rng.normal(scale=4.0, size=(2, 9, 500))
    z[::2, ::7] = -np.inf
    base[3, 5:] = -np.inf
    base[3, :5] = z[3, :5]
    z[3, 5:] = -np.inf
    measures = measure(torch.tensor(z).float(), torch.tensor(base).float())
    for row in range(9):
        kl, *choices = measure_reference(z[row], base[row])
        got = [float(numbers[row]) for numbers in measures]
        masses = [np.logaddexp.reduce(s) for s in (z[row], base[row])]
        assert got[:3] == pytest.approx([kl, *masses], abs=1e-4)
        assert got[3:] == choices
