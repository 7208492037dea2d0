"""What we add to vLLM's benchmark client: tenants, goodput's share, requests in flight."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from load_tests.bench_client import NAMES, RunFailedError, concurrency, drawn_kinds, figures, zipf
from load_tests.scenario import Tenants, load_scenarios

KINDS = [{"model": f"m{i}"} for i in range(6)]


def test_zipf_is_the_formula() -> None:
    harmonic = 1 + 1 / 2 + 1 / 3
    assert zipf(3, 1.0) == pytest.approx([1 / harmonic, 1 / 2 / harmonic, 1 / 3 / harmonic])
    assert zipf(4, 0.0) == [0.25] * 4
    assert math.isclose(sum(zipf(100, 1.3)), 1)


def test_kinds_are_drawn_as_often_as_zipf_says() -> None:
    """Chi-square; a right sampler fails once in a million seeds, and the seed is fixed."""
    drawn = Counter(k["model"] for k in drawn_kinds(Tenants(exponent=1.0, kinds=KINDS), 6000, 3))
    expected = [6000 * chance for chance in zipf(len(KINDS), 1.0)]
    assert stats.chisquare([drawn[k["model"]] for k in KINDS], expected).pvalue > 1e-6


def test_the_same_seed_draws_the_same_kinds() -> None:
    tenants = Tenants(exponent=1.0, kinds=KINDS)
    assert drawn_kinds(tenants, 50, 1) == drawn_kinds(tenants, 50, 1) != drawn_kinds(tenants, 50, 2)


def test_requests_in_flight() -> None:
    """0 to 4, 1 to 2 and 2 to 6: the third comes when the second has gone."""
    found = concurrency(np.array([0.0, 1.0, 2.0]), np.array([4.0, 2.0, 6.0]))
    assert found == {"concurrency": 9 / 6, "peak_concurrency": 2.0}


def result(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(NAMES, 1.0)
    found |= {"completed": 4, "failed": 0, "duration": 8.0, "request_goodput": 0.375}
    found |= {"start_times": [10.0, 11.0], "ttfts": [0.5, 1.0], "itls": [[0.5, 1.0], []]}
    return found | changes


def test_the_share_of_good_requests() -> None:
    found = figures(result(), load_scenarios()["plain"])
    assert found["good_share"] == 0.75
    assert found["concurrency"] == pytest.approx(3.0 / 2.0)
    assert set(found) == {*NAMES, "good_share", "concurrency", "peak_concurrency"}


def test_failed_requests_are_no_figures() -> None:
    with pytest.raises(RunFailedError, match="plain: 1 requests failed: Bad Request"):
        figures(result(failed=1, errors=["", "Bad Request"]), load_scenarios()["plain"])
