"""The frame of the evidence: intervals, JSON, the page; no model."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from smollm.evidence import page
from smollm.evidence.asking import distinct, perplexity
from smollm.evidence.claim import Claim, Mean, Plot, Share, Table, above, below

CLAIM = Claim(
    name="made",
    title="Made | up, in a test",
    claim="Nothing is claimed.",
    holds=True,
    best_prompt=Share(10, 40),
    ours=Share(30, 40),
    how="Not at all.",
    tables=(
        Table(
            "All of it",
            ("what", "share", "mean", "tokens"),
            (("a | b", Share(30, 40), Mean.over([1.0, 2.0, 4.0]), 12345.0), ("c", "", 0.25, 3)),
            "A note.",
        ),
    ),
    plots=(Plot("Line", "x", "y", {"ours": [(0.0, 0.1, 0.0, 0.2), (1.0, 0.5, 0.4, 0.6)]}),),
    seconds=125.0,
    date="December 2026",
    examples=(("Which?", "this", "that"),),
)


@pytest.mark.parametrize(("hits", "of"), [(0, 12), (1, 12), (6, 12), (12, 12), (143, 200)])
def test_the_interval_of_a_share_is_wilsons(hits: int, of: int) -> None:
    share = Share(hits, of)
    interval = stats.binomtest(hits, of).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((interval.low, interval.high), abs=1e-5)
    assert Share.over([True] * hits + [False] * (of - hits)) == share


def test_the_interval_of_a_mean_holds_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 60 from a known distribution, about 95 % have its mean in theirs."""
    rng = random.Random(3)
    held = 0
    for _ in range(200):
        found = Mean.over([rng.expovariate(1.0) for _ in range(60)])
        held += found.low <= 1.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99
    values = [1.0, 5.0, 6.0]
    assert Mean.over(values).value == statistics.fmean(values)
    assert Mean.over(values) == Mean.over(values), "the same figures from the same values"


def test_intervals_that_touch_decide_nothing() -> None:
    low, high = Mean(1.0, 0.5, 1.5, 9), Mean(2.0, 1.5, 2.5, 9)
    assert not above(high, low) and not below(low, high)
    assert above(Mean(2.1, 1.6, 2.6, 9), low) and below(low, Mean(2.1, 1.6, 2.6, 9))


def test_a_claim_comes_back_from_its_file(tmp_path: Path) -> None:
    path = CLAIM.write(tmp_path)
    back = Claim.read(path)
    assert back.write(tmp_path / "again").read_bytes() == path.read_bytes()
    assert back.ours == CLAIM.ours and back.plots == CLAIM.plots
    assert back.tables[0].rows[1] == CLAIM.tables[0].rows[1]
    unmeasured = Claim("n", "N", "c", False, None, None, "h")
    assert Claim.read(unmeasured.write(tmp_path)) == unmeasured


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="t: 1 cells under 2 heads"):
        Table("t", ("a", "b"), (("x",),))


def test_the_page_shows_a_claim() -> None:
    text = page.part([CLAIM])
    assert "| yes |" in text and "**It holds.**" in text and "2 minutes" in text
    assert "| a \\| b | 75.0 % (59.8 % to 85.8 %) | 2.33 (1 to 4) | 12,345 |" in text
    assert "| c |  | 0.25 | 3 |" in text
    assert "(evidence/made-1.png)" in text


def test_a_page_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="0 parts"):
        page.whole("# Page\n", [CLAIM])


def test_a_plot_is_small(tmp_path: Path) -> None:
    page.draw(CLAIM.plots[0], tmp_path / "plot.png")
    assert 1_000 < (tmp_path / "plot.png").stat().st_size < 100_000


def test_the_page_is_made_from_its_figures() -> None:
    text = page.PAGE.read_text("utf-8")
    assert page.whole(text, page.claims()) == text, "run `python -m smollm.evidence --page`"


@pytest.mark.parametrize("other", page.QUOTING, ids=lambda path: path.stem)
def test_other_pages_quote_the_figures(other: Path) -> None:
    text = other.read_text("utf-8")
    assert page.quoting(text, other, page.claims()) == text, (
        "run `python -m smollm.evidence --page`"
    )


def test_a_quote_is_made_from_the_claim() -> None:
    text = (
        "A <!-- evidence -->0 of 0<!-- end --> b.\n<!-- evidence context -->\nlast\n<!-- end -->\n"
    )
    other = page.ROOT / "docs" / "guide" / "methods" / "guidance.md"
    made = page.quoting(text, other, [replace(CLAIM, name="context")])
    assert "<!-- evidence -->1 of 1<!-- end -->" in made and "last" not in made
    assert "](../../reports/evidence.md#made--up-in-a-test)" in made and "75.0 %" in made
    assert "Not measured" in page.quoting(text, other, [])
    with pytest.raises(ValueError, match="'nothing', which is none of context, "):
        page.quoting(text.replace("context", "nothing"), other, [])


def test_the_pages_quote() -> None:
    texts = "".join(other.read_text("utf-8") for other in page.QUOTING)
    quoted = {found[1] for found in page.QUOTE.finditer(texts)}
    assert {None, "context", "instructions"} <= quoted


@pytest.mark.parametrize("claim", page.claims(), ids=lambda one: one.name)
def test_a_claim_that_holds_is_better_than_the_best_prompt(claim: Claim) -> None:
    assert claim.date and claim.seconds
    for index, _ in enumerate(claim.plots):
        file = page.FOLDER / page.plot_file(claim, index)
        assert file.stat().st_size < 100_000
    if claim.holds:
        assert claim.ours and claim.best_prompt
        assert above(claim.ours, claim.best_prompt) or below(claim.ours, claim.best_prompt)


def test_diversity_and_perplexity() -> None:
    assert distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert distinct(["one"], 2) == 0
    assert perplexity([[-1.0], [], [-2.0, -3.0]]) == pytest.approx(2.718281828**2)
