"""The float64 definition of the read-out sum, on cases small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.kernels.reference import (
    FLOOR,
    SET_BACK,
    best_reply,
    log_softmax,
    mix_reference,
    nucleus,
    shared,
)
from steering.plan import Ender, Gate, Recipe, Rule, RuleKind

NEVER = -math.inf
SOFT = Rule(RuleKind.SELECT, "twin", 0.0, "critic", gate=Gate.HEAD, ender=Ender.SUM)
HARD = replace(SOFT, param=0.5, hard=True, best=True)


def log(*probabilities: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([3.0], 0),
        ([1.0, 2.0, 2.0], 1),
        ([-5.0, -4.0, -6.0], 1),
        ([math.nan, -1e30], 1),
        ([math.inf, 1.0, math.nan], 1),
        ([math.nan, math.nan], 0),
    ],
)
def test_the_best_reply_has_the_largest_finite_value_and_is_the_first_of_equals(
    values: list[float], best: int
) -> None:
    assert best_reply(values) == best


def test_sum_adds_scaled_scores() -> None:
    logits = {"base": np.array([1.0, 2.0]), "chat": np.array([3.0, 5.0])}
    assert mix_reference(Recipe({"base": 1.0, "chat": -0.5}), logits).tolist() == [-0.5, -0.5]


def test_base_left_out_counts_nothing() -> None:
    logits = {"base": np.array([7.0, NEVER]), "chat": np.array([3.0, 5.0])}
    assert mix_reference(Recipe({"chat": 1.0}), logits).tolist() == [3.0, 5.0]


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_an_id_that_the_base_rules_out_stays_out(weight: float) -> None:
    logits = {"base": np.array([1.0, NEVER, 1.0]), "chat": np.array([1.0, 1.0, 2.0])}
    z = mix_reference(Recipe({"base": 1.0, "chat": weight}), logits)
    assert z.tolist() == [1.0 + weight, NEVER, 1.0 + 2.0 * weight]


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_an_id_that_a_stream_lacks_gets_no_delta(shift: float) -> None:
    # Raw scores have arbitrary offsets, which must not move lacking ids against the others.
    logits = {
        "base": log(0.5, 0.3, 0.2) + shift,
        "chat": log(0.9, 0.1, 0.0) - shift,
        "plain": log(0.4, 0.5, 0.1) + 3 * shift,
    }
    z = mix_reference(Recipe({"base": 1.0, "chat": 0.5, "plain": -0.5}), logits)
    expected = log(0.5 * (0.9 / 0.4) ** 0.5, 0.3 * (0.1 / 0.5) ** 0.5, 0.2)
    assert log_softmax(z) == pytest.approx(log_softmax(expected))


def test_a_lacking_id_keeps_the_bases_probability_in_every_rule() -> None:
    logits = {"base": log(0.5, 0.3, 0.2) + 9, "chat": log(0.9, 0.1, 0.0) - 4}
    weights = {"base": 0.5, "chat": 1.0}
    z = mix_reference(Recipe(weights, Rule(RuleKind.NUCLEUS, "chat", 0.8)), logits)
    expected = log(0.9 * 0.5**0.5, 0.1, 0.2)
    assert log_softmax(z) == pytest.approx(log_softmax(expected))
    z = mix_reference(Recipe(weights, Rule(RuleKind.PLAUSIBLE, "base", 0.5)), logits)
    plain = mix_reference(Recipe(weights), logits)
    assert z[:2] == pytest.approx(plain[:2])
    assert z[2] == pytest.approx(plain[2] - SET_BACK - np.ptp(plain))


@pytest.mark.parametrize("weight", [0.0, -0.5])
def test_without_the_base_a_lacking_id_is_set_back(weight: float) -> None:
    logits = {"base": log(0.5, 0.3, 0.15, 0.05) + 7, "chat": log(0.9, 0.1, 0.0, 0.0) - 2}
    z = mix_reference(Recipe({"base": weight, "chat": 1.0}), logits)
    # The constants of the streams' own scores cancel: raw sums have them, and these ids too.
    raw = weight * 7 - 2
    assert z[:2] == pytest.approx(weight * log(0.5, 0.3) + log(0.9, 0.1) + raw)
    assert z[2:] == pytest.approx(log(0.15, 0.05) + raw - SET_BACK)


def test_a_stream_with_coefficient_zero_is_not_in_the_sum() -> None:
    logits = {"base": np.array([1.0, 2.0]), "chat": np.array([NEVER, math.nan])}
    assert mix_reference(Recipe({"base": 1.0, "chat": 0.0}), logits).tolist() == [1.0, 2.0]


def test_plausible_keeps_ids_at_the_threshold_and_above() -> None:
    logits = {"base": log(0.5, 0.3, 0.15, 0.05)}
    for share, plausible in ((0.29, 3), (1.0, 1)):
        z = mix_reference(Recipe({"base": 1.0}, Rule(RuleKind.PLAUSIBLE, "base", share)), logits)
        back = [0.0] * plausible + [SET_BACK + math.log(10)] * (4 - plausible)
        assert z == pytest.approx(logits["base"] - back)


@given(
    st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=2, max_size=30),
    st.floats(0, 10),
    st.floats(0.01, 1),
)
def test_no_two_biases_lift_an_implausible_id_over_a_plausible_one(
    scores: list[tuple[float, float]], strength: float, share: float
) -> None:
    base, amateur = (np.array(column) for column in zip(*scores, strict=True))
    logits, weights = {"base": base, "plain": amateur}, {"base": 1 + strength, "plain": -strength}
    z = mix_reference(Recipe(weights, Rule(RuleKind.PLAUSIBLE, "base", share)), logits)
    plausible = base >= base.max() + math.log(share)
    assert np.isfinite(z).all()
    if not plausible.all():
        assert z[~plausible].max() + 100 < z[plausible].min() - 100
    # Among the others, and among these, the order is the sum's.
    plain = mix_reference(Recipe(weights), logits)
    for some in (plausible, ~plausible):
        assert np.diff(z[some]) == pytest.approx(np.diff(plain[some]), abs=1e-6)


@pytest.mark.parametrize("size", [2, 50_000, 300_000])
def test_what_is_set_back_has_no_weight_at_temperature_two(size: int) -> None:
    z = np.full(size, -SET_BACK)
    z[0] = 0.0
    assert np.exp(log_softmax(z / 2))[1:].sum() < 1e-38  # below the least normal float32


@pytest.mark.parametrize("rule", [HARD, SOFT])
def test_a_selecting_row_has_the_scale_of_its_sum(rule: Rule) -> None:
    """Penalties depend on a score's sign, so no row of a request may have another constant."""
    aligned, pretrained = log(0.5, 0.3, 0.2) + 11, log(0.2, 0.1, 0.7) - 30
    logits = {"base": aligned, "twin": pretrained}
    weights = {"base": 1.0, "twin": 1.0}
    sums = [
        mix_reference(Recipe(weights, rule), logits | {"critic": np.array([odds])}, [0])
        for odds in (-800.0, -2.0, 2.0, 800.0)
    ]
    assert sums[0] == pytest.approx(aligned)
    for z in sums:
        assert z.max() == pytest.approx(11, abs=2)
        assert np.isfinite(z).all()


@pytest.mark.parametrize("odds", [-800.0, -2.0, 2.0, 800.0])
@pytest.mark.parametrize("rule", [HARD, SOFT])
def test_a_selecting_row_has_a_score_for_ids_that_its_stream_lacks(rule: Rule, odds: float) -> None:
    logits = {"base": log(0.5, 0.3, 0.2), "twin": log(0.9, 0.1, 0.0), "critic": np.array([odds])}
    weights = {"base": 1.0, "twin": 1.0}
    assert np.isfinite(mix_reference(Recipe(weights, rule), logits)).all()


BASE_P, TWIN_P = (0.5, 0.3, 0.15, 0.05), (0.1, 0.2, 0.3, 0.4)


def selected(rule: Rule, odds: float = 0.0, ends: tuple[int, ...] = ()) -> list[float]:
    """Probabilities of a row over four ids."""
    logits = {"base": log(*BASE_P) + 7, "twin": log(*TWIN_P) - 3, "critic": np.array([odds])}
    z = mix_reference(
        Recipe({"base": 1.0, "twin": 1.0}, replace(rule, stream="twin")), logits, ends
    )
    return [float(p) for p in np.exp(log_softmax(z))]


def mixture(share: float) -> list[float]:
    return [(1 - share) * p + share * q for p, q in zip(BASE_P, TWIN_P, strict=True)]


def test_a_soft_gate_adds_probabilities() -> None:
    assert selected(Rule(RuleKind.SELECT, param=0.25)) == pytest.approx(mixture(0.25))
    by_head = Rule(RuleKind.SELECT, head="critic", gate=Gate.HEAD)
    assert selected(by_head, math.log(4)) == pytest.approx(mixture(0.8))
    assert selected(replace(by_head, param=0.85), math.log(4)) == pytest.approx(BASE_P), "closed"
    doubt = Rule(RuleKind.SELECT, param=1.0, gate=Gate.DOUBT)
    assert selected(doubt) == pytest.approx(mixture(0.5))


def test_a_hard_gate_takes_one_row() -> None:
    doubt = Rule(RuleKind.SELECT, gate=Gate.DOUBT, hard=True)
    assert selected(replace(doubt, param=0.49)) == pytest.approx(BASE_P)
    assert selected(replace(doubt, param=0.51)) == pytest.approx(TWIN_P)
    by_head = Rule(RuleKind.SELECT, "", 0.5, "critic", gate=Gate.HEAD, hard=True)
    assert selected(by_head, 0.01) == pytest.approx(TWIN_P)
    assert selected(by_head, -0.01) == pytest.approx(BASE_P)
    assert selected(replace(by_head, best=True), 1.0) == pytest.approx([0, 0, 0, 1])


def test_who_may_end_the_text() -> None:
    doubt = Rule(RuleKind.SELECT, param=0.1, gate=Gate.DOUBT, hard=True, ender=Ender.STREAM)
    assert selected(doubt, ends=(0,)) == pytest.approx(TWIN_P), "the sum would end it"
    assert selected(doubt, ends=(1,)) == pytest.approx(BASE_P)
    barred = replace(doubt, param=1.0, ender=Ender.SUM)
    assert selected(barred, ends=(3,)) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 0])


def test_ids_that_both_top_lists_share() -> None:
    # Ranks 0 1 2 3 and 3 2 1 0: one in common at n = 3, then all four.
    assert shared(log(*BASE_P), log(*TWIN_P), 1).tolist() == [False, True, True, False]
    assert shared(log(*BASE_P), log(*TWIN_P), 3).tolist() == [True] * 4
    assert shared(log(0.4, 0.3, 0.2, 0.1), log(0.3, 0.4, 0.1, 0.2), 1).tolist() == [
        True, True, False, False,
    ]  # fmt: skip
    # 3 p_twin − 2 p_base: only the ids inside, and never below the floor.
    found = selected(Rule(RuleKind.SELECT, param=3.0, count=1))
    inside = [1e-8, 3 * 0.3 - 2 * 0.15]
    assert found == pytest.approx([0, inside[0] / sum(inside), inside[1] / sum(inside), 0])
    assert math.exp(FLOOR) == pytest.approx(1e-8)


def test_a_count_keeps_ids_that_a_share_would_not() -> None:
    logits = {"base": log(*BASE_P)}

    def kept(param: float, count: float) -> int:
        rule = Rule(RuleKind.PLAUSIBLE, "base", param, count=count)
        return int((mix_reference(Recipe({"base": 1.0}, rule), logits) > -100).sum())

    assert [kept(1.0, n) for n in (0, 1, 2, 3, 9)] == [1, 1, 2, 3, 4]
    assert (kept(0.25, 1), kept(0.25, 2), kept(0.05, 2)) == (3, 3, 4)
    assert (kept(1.0, 0.5), kept(1.0, 0.76), kept(1.0, 0.01)) == (2, 3, 1), "shares of the table"


def test_nucleus_masks_the_delta_and_keeps_the_ids() -> None:
    logits = {
        "base": log(0.1, 0.2, 0.7) + 5.0,
        "chat": log(0.6, 0.3, 0.1),
        "plain": log(0.3, 0.3, 0.4) - 2.0,
    }
    recipe = Recipe({"base": 2.0, "chat": 1.0, "plain": -2.0}, Rule(RuleKind.NUCLEUS, "chat", 0.7))
    z = mix_reference(recipe, logits)
    expected = [
        math.log(0.6) + 2 * math.log(0.1 / 0.3),
        math.log(0.3) + 2 * math.log(0.2 / 0.3),
        math.log(0.1),
    ]
    assert z == pytest.approx(expected)


@pytest.mark.parametrize(
    ("p", "inside"),
    [
        (1e-9, [False, True, False, False]),
        (0.5, [False, True, False, False]),
        (0.51, [True, True, False, False]),
        (0.75, [True, True, False, False]),
        (0.8, [True, True, True, False]),
        (1.0, [True, True, True, True]),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_p(p: float, inside: list[bool]) -> None:
    # Powers of two, so that the running mass is exact; ids 2 and 3 are tied.
    assert nucleus(np.log(np.array([0.25, 0.5, 0.125, 0.125])), p).tolist() == inside


def test_nucleus_at_one_is_everything_even_where_rounding_reaches_one_early() -> None:
    assert nucleus(np.array([100.0, 0.0, -50.0, NEVER]), 1.0).all()


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40), st.floats(0.001, 1))
def test_nucleus_is_minimal(scores: list[float], p: float) -> None:
    array = np.array(scores)
    probability = np.exp(log_softmax(array))
    inside = nucleus(array, p)
    mass = probability[inside].sum()
    assert mass >= p - 1e-9
    if p < 1:
        assert mass - probability[inside].min() < p + 1e-9
