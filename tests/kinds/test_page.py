"""The page shows what these tests found, of every kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.adapters.kinds import REFUSED, SERVED
from tests.kinds.table import BEGIN, END, KINDS, TOLERANCE, Row, into

pytestmark = pytest.mark.last  # it compares what the other files have found

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "adapter-kinds.md").read_text("utf-8")


def shown() -> dict[str, list[str]]:
    """Kind → its cells on the page."""
    facts = PAGE.partition(BEGIN)[2].partition(END)[0]
    lines = [line[2:-2] for line in facts.splitlines() if line[:2] == "| "][2:]
    cells = [re.split(r" (?<!\\)\| ", line) for line in lines]
    return {kind: rest for kind, *rest in cells}


def test_every_kind_is_on_the_page_and_is_exact_or_refused(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--kinds-table", None) is not None:
        pytest.skip("this run writes the page")
    rows = shown()
    assert tuple(rows) == KINDS
    for kind in {case.kind for case in SERVED}:
        assert float(rows[kind][-1].removeprefix("exact: ")) < TOLERANCE, kind
    for kind in {case.kind for case in REFUSED}:
        assert rows[kind][-1].startswith("refused: "), kind


def test_the_page_has_todays_configs_and_sentences(request: pytest.FixtureRequest) -> None:
    from tests.kinds.conftest import _rows

    if request.config.getoption("--kinds-table", None) is not None:
        pytest.skip("this run writes the page")
    rows = shown()
    for kind, row in _rows.items():
        _, config, bases, here = row.cells()
        assert rows[kind][:2] == [config, bases]
        assert row.error is not None or rows[kind][2] == here


def test_facts_go_between_the_marks_and_leave_the_rest() -> None:
    one, other = Row(SERVED[0]), Row(REFUSED[0])
    one.served(SERVED[0], 2e-7)
    one.served(SERVED[1], 3e-6)
    other.refused(REFUSED[0], "it is not|served")
    page = into(f"before\n{BEGIN}\nold\n{END}\nafter\n", [other, one])
    assert page.startswith(f"before\n{BEGIN}\n| kind |") and page.endswith(f"{END}\nafter\n")
    assert "| LoRA | `LoraConfig()` | llama, gpt2 | exact: 3e-06 |" in page
    assert r"refused: it is not\|served |" in page
    assert page.index("exact") < page.index("refused") and "old" not in page
    with pytest.raises(AssertionError, match="both, or neither"):
        Row(SERVED[0]).cells()
