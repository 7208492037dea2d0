"""The page shows what these tests measured, of every fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.table import BEGIN, END, FAULTS, RIGHT, WRONG, Row, into

PAGE = (Path(__file__).parents[2] / "docs" / "reports" / "faults.md").read_text("utf-8")


def test_the_page_has_every_fault_in_order_and_nothing_is_wrong_or_lost(
    request: pytest.FixtureRequest,
) -> None:
    if request.config.getoption("--faults-table", None) is not None:
        pytest.skip("this run writes the page")
    facts = PAGE.partition(BEGIN)[2].partition(END)[0]
    rows = [re.findall(r" ([^|]+) \|", line) for line in facts.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == list(FAULTS.values())
    for fault, saw, seconds, lost in rows[2:]:
        assert re.match(r"[1-9]\d* right answers; 0 wrong", saw), fault
        assert float(seconds) >= 0
        assert all(part.startswith("0 of ") for part in lost.split("; ")), fault


def test_facts_go_between_the_marks_and_leave_the_rest() -> None:
    row = Row("disk-full", normal_s=1.25, slowest_s=0.5)
    row.saw.update({RIGHT: 7, "refused 503": 2, "error event": 1})
    row.loses("adapters", {"a", "b"}, {"a", "b", "c"})
    page = into(f"before\n{BEGIN}\nold\n{END}\nafter\n", [row])
    assert page.startswith(f"before\n{BEGIN}\n| fault |") and page.endswith(f"{END}\nafter\n")
    told = ("7 right answers; 0 wrong; error event: 1; refused 503: 2; slowest answer 0.5 s | 1.2 "
            "| 0 of 2 adapters |")  # fmt: skip
    assert f"| {FAULTS['disk-full']} | {told}" in page
    assert "old" not in page


def test_a_row_refuses_losses_and_recoveries_that_nobody_measured() -> None:
    with pytest.raises(AssertionError, match="adapters"):
        Row("abandoned").loses("adapters", {"a", "b"}, {"a"})
    with pytest.raises(AssertionError, match="nobody measured"):
        Row("abandoned").cells()
    assert Row("abandoned").saw[WRONG] == 0
