"""The tenants' test itself: what it would find, and its short form against a real server."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from load_tests.tenants.__main__ import run
from load_tests.tenants.findings import BEGIN, END, Finding, into, table
from load_tests.tenants.load import AGAIN, FIRST, Book
from load_tests.tenants.statistics import compare, ranks
from load_tests.tenants.timing import LEVEL, MATE, NOBODY, OTHER, OWN, judged


def times(median: float, n: int = 60, seed: int = 0) -> list[float]:
    """Times with a long tail, as a server has them; milliseconds."""
    found: list[float] = np.random.default_rng(seed).lognormal(np.log(median), 0.2, n).tolist()
    return found


def test_the_statistic_is_mann_and_whitneys() -> None:
    """Against scipy's, with ties."""
    first, second = [1.0, 2.0, 2.0, 5.0, 7.0], [2.0, 3.0, 8.0, 9.0, 9.0, 11.0, 12.0]
    found = compare(first, second)
    theirs = mannwhitneyu(second, first)
    assert found.faster == pytest.approx(theirs.statistic / (5 * 7))
    exact = mannwhitneyu([1.0, 2.1, 2.2, 5.0, 7.0], [2.5, 3.0, 8.0, 9.0, 9.5, 11.0, 12.0],
                         method="exact")  # fmt: skip
    ours = compare([1.0, 2.1, 2.2, 5.0, 7.0], [2.5, 3.0, 8.0, 9.0, 9.5, 11.0, 12.0])
    assert ours.p == pytest.approx(exact.pvalue, abs=0.01)


def test_equal_times_share_their_ranks() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_a_p_value_below_a_level_is_as_rare_as_the_level_says() -> None:
    """200 pairs of the same distribution: about 10 below 0.05."""
    pairs = [(times(10, 12, i), times(10, 12, 1000 + i)) for i in range(200)]
    low = sum(compare(a, b, permutations=999).p < 0.05 for a, b in pairs)
    assert 2 <= low <= 20


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 and 0"):
        compare([1.0], [])


def told(medians_ms: tuple[float, float, float, float], **cached: int) -> list[str]:
    """What the timing would tell, for these medians of own, mate, other and nobody."""
    medians = dict(zip((OWN, MATE, OTHER, NOBODY), medians_ms, strict=True))
    found = {kind: times(median, seed=i) for i, (kind, median) in enumerate(medians.items())}
    counts = {OWN: 416, MATE: 416, OTHER: 0, NOBODY: 0, **cached}
    return [one.leak for one in judged("here", found, counts)]


def test_what_the_timing_finds() -> None:
    assert told((10, 10, 20, 20)) == ["", "", "", ""]
    # Shared with everybody, as without salts: by time and by the counts.
    assert told((10, 10, 10, 20), other=416) == ["", "", *["the other has sent it"] * 2]
    # A smaller difference, and counts that keep silent about it.
    assert told((10, 10, 16, 20)) == ["", "", "the other has sent it", ""]


def test_a_timing_that_sees_nothing_does_not_pass() -> None:
    assert told((20, 20, 20, 20))[:2] == ["cannot be seen"] * 2
    assert "cannot" in told((10, 10, 20, 20), own=0)[3]
    assert "cannot" in told((10, 10, 20, 20), nobody=416)[3]


def test_a_load_that_saw_nothing_does_not_pass() -> None:
    book = Book()
    book.note(FIRST)
    assert book.finding().leak == f"no {AGAIN}"
    book.note(AGAIN)
    assert not book.finding().leak
    book.note(FIRST, "64 cached")
    assert "64 cached" in book.finding().leak


def test_the_table() -> None:
    found = [Finding("a|b", "1", "all"), Finding("c", "2")]
    assert table(found).splitlines()[2:] == ["| a\\|b | 1 | **all** |", "| c | 2 | nothing |"]
    page = into(f"x\n{BEGIN}\nold\n{END}\ny\n", found, "here.")
    assert page.startswith("x\n") and page.endswith("y\n") and "old" not in page
    assert into(page, found, "here.") == page


@pytest.mark.engine
@pytest.mark.nightly
def test_two_tenants_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    """The short form; `python -m load_tests.tenants` has more rounds and a page."""
    found = run(rounds=40, seed=2)
    leaks = [f"{one.what}: {one.shown} {one.leak}" for one in found if one.leak]
    assert not leaks, "\n".join(leaks)
    assert len(found) > 40 and LEVEL < 0.01
