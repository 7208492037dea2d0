"""The torch mix against the float64 definition, over odd sizes and hostile inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.kernels import reference
from steering.kernels.mix import Ends, Rules, measure, mix, nucleus, shared
from steering.kernels.reference import measure_reference
from steering.plan import Ender, Gate, Rule, RuleKind
from tests.steering.kernels.rows import RULES, SHARED, Batch

TOLERANCE = 2e-4
"""float32 against float64 on scores of magnitude 10 to 100."""


@pytest.mark.parametrize("size", [1, 63, 500, 32_003])
@pytest.mark.parametrize("hostile", [False, True], ids=["finite", "minus-infinity"])
def test_every_row_agrees_with_the_definition(size: int, hostile: bool) -> None:
    rng, forms = np.random.default_rng(size + hostile), (*RULES, SHARED)
    batch = Batch.draw(rng, 2 * len(forms), 3, size, torch.float32, hostile, forms=forms)
    coef, rules = batch.control()
    found = mix(batch.logits(torch.float32), coef, rules)
    for row in range(len(coef)):
        want, got = batch.wanted(row), found[row].double().numpy()
        assert np.array_equal(np.isneginf(got), np.isneginf(want)), batch.recipe(row)
        finite = np.isfinite(want)
        assert np.allclose(got[finite], want[finite], atol=TOLERANCE), batch.recipe(row)


def test_shared_ids_of_small_tables_with_ties() -> None:
    rng = np.random.default_rng(2)
    one, other = np.round(rng.normal(size=(2, 40, 9)), 0)
    count = torch.tensor(rng.integers(1, 10, 40))
    found = shared(torch.tensor(one), torch.tensor(other), count).numpy()
    for row in range(40):
        assert np.array_equal(found[row], reference.shared(one[row], other[row], int(count[row])))


def test_plain_sums_skip_the_rules() -> None:
    logits = [torch.randn(4, 10) for _ in range(2)]
    coef = torch.tensor([[1.0, 0.5]]).expand(4, 2)
    none = Rules.of(torch.zeros(4, 5))
    assert torch.equal(mix(logits, coef, None), mix(logits, coef, none))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng, forms = np.random.default_rng(3), (*RULES, SHARED)
    batch = Batch.draw(rng, len(forms), 3, 101, torch.float32, forms=forms)
    logits, (coef, rules) = batch.logits(torch.float32), batch.control()
    together = mix(logits, coef, rules)
    for row in range(len(coef)):
        one = torch.tensor([row])
        alone = mix([s[one] for s in logits], coef[one], rules.take(one))
        assert torch.equal(alone[0], together[row]), batch.recipe(row)


def test_an_id_is_in_the_nucleus_if_the_mass_before_it_is_below_p() -> None:
    """Four ids of a quarter each, exactly: with p = ½ the third has all of p before it."""
    inside = nucleus(torch.zeros(3, 4), torch.tensor([0.5, 0.51, 0.25]))
    assert inside.sum(-1).tolist() == [2, 3, 1] and inside[:, 0].all()


def test_a_critical_token_is_no_end_however_likely_that_is() -> None:
    scores = torch.tensor([[300.0, 1.0, 3.0, 2.0]])
    rule = Rule(
        RuleKind.SELECT, param=0.5, gate=Gate.HEAD, hard=True, ender=Ender.SUM, best=True
    )  # fmt: skip
    table = torch.tensor([[rule.kind, 1, rule.param, 0, rule.options, 1]]).float()
    ends = Ends(torch.tensor([[True, False, False, False]]), torch.zeros(1))
    found = mix([torch.zeros(1, 4), scores], torch.ones(1, 2), Rules.of(table)._replace(ends=ends))
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
