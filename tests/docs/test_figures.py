"""Published figures are their sources' own: JSON files, tables of other pages, or a command."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from load_tests import load_report
from load_tests.soak import report as soak_report
from load_tests.soak.__main__ import read
from smollm.evidence.claim import Claim, Share, Table
from tests.docs.figures import ROOT, Figure, cells, figures, holds, problem, sections, visible

DOCS = ROOT / "docs"
METHODS = sorted((DOCS / "guide" / "methods").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    *METHODS,
    DOCS / "internals" / "speed.md",
    DOCS / "reports" / "evidence.md",
]
MEASURED = {"README.md": ("Figures",), "methods": ("Cost", "The cost of streams")}
"""The sections with figures; of the other pages all."""
FIGURES = [figure for page in PAGES for figure in figures(page)]
_WHOLE = r"(?<![\w.,/-])"
NUMBER = "|".join(
    (
        _WHOLE + r"\d+\.\d+(?:e-\d+)?(?![\w.]*\w)",
        _WHOLE + r"\d{1,3}(?:,\d{3})+",
        _WHOLE + r"\d{3,}(?![\w.,]*\d)",
    )
)
"""Decimals and numbers of three digits or more."""
COMMAND = re.compile(r"`(?:make ([\w-]+)|python -m ([\w.]+))")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def name_of(page: Path) -> str:
    """For a test's id."""
    return str(page.relative_to(ROOT))


def measured(page: Path) -> list[tuple[str, str]]:
    """The sections of a page that state figures."""
    chosen = MEASURED.get(page.name if page.parent == ROOT else page.parent.name)
    return [one for one in sections(page.read_text("utf-8")) if not chosen or one[0] in chosen]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.page} {f.section} {f.text}")
def test_a_figure_is_its_source(figure: Figure) -> None:
    assert problem(figure) is None
    page = dict(sections((ROOT / figure.page).read_text("utf-8")))
    assert holds(visible(page[figure.section]), figure.text), "the section does not show it"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_figure_has_a_source_or_a_command_and_a_date(page: Path) -> None:
    """The command and the date may stand at the head of the page."""
    head = sections(page.read_text("utf-8"))[0][1]
    sourced = [one.text for one in figures(page)]
    for heading, text in measured(page):
        commands = COMMAND.findall(text)
        for target, module in COMMAND.findall(head) + commands:
            assert target in TARGETS or find_spec(module), (heading, target, module)
        dated = re.search(r"\b20\d\d\b", head + text)
        for number in re.findall(NUMBER, visible(text)):
            if number in ("2026",) or any(holds(shown, number) for shown in sourced):
                continue
            by_hand = "tried once by hand" in text
            assert (commands and dated) or by_hand, f"{heading}: {number} has no source"


@pytest.mark.parametrize(
    ("text", "source", "says"),
    [
        ("88.9 %", ("zoo/README.md", "proxy-tuning, strength 1.25", "score"), "the cell is"),
        ("8.8 %", ("zoo/README.md", "proxy-tuning, strength 1.25", "score"), "the cell is"),
        ("88.8 %", ("zoo/README.md", "proxy-tuning, strength 9", "score"), "no such row"),
        ("3,168", ("docs/reports/faults.md", "3168 answers were wrong"), "lacks these words"),
        ("220,168", ("docs/reports/soak/figures.json", "tokens"), "gives 1244642"),
    ],
)
def test_a_wrong_figure_is_found(text: str, source: tuple[str, ...], says: str) -> None:
    assert says in str(problem(Figure("", "", text, source)))


@pytest.mark.parametrize(
    ("text", "source", "says"),
    [
        ("75.0 %", ("ours/value",), None),
        ("74.0 %", ("ours/value",), "gives 75.0"),
        ("75.0 %", ("steered", "followed"), None),
        ("1,234", ("steered", "tokens"), None),
        ("25.0 %", ("steered", "followed"), "the cell is"),
        ("75.0 %", ("plain", "followed"), "no such row"),
    ],
)
def test_a_figure_of_the_evidence_is_its_claims(
    tmp_path: Path, text: str, source: tuple[str, ...], says: str | None
) -> None:
    share = Share(30, 40)
    table = Table("All", ("what", "followed", "tokens"), (("steered", share, 1234.0),))
    path = Claim("made", "T", "c", True, None, share, "h", (table,)).write(tmp_path)
    found = problem(Figure("", "", text, (str(path), *source)))
    assert found is None if says is None else says in str(found)


def test_whole_figures_only() -> None:
    assert holds("1,234.5 and 0.93 (0.84–0.97)", "0.93") and holds("2566", "2,566")
    assert not holds("10.93", "0.93") and not holds("0.935", "0.93") and not holds("12566", "2,566")
    assert cells("| a | b |\n|---|---|\n| x | 1 |\n\n| x | 2 |", "x", "b") == ["1"]


def test_the_load_report_is_made_from_its_figures() -> None:
    page = DOCS / "reports" / "load-report.md"
    found = json.loads((page.with_suffix("") / "figures.json").read_text("utf-8"))
    assert load_report.page(found, "load-report") == page.read_text("utf-8")


def test_the_soak_report_shows_its_figures() -> None:
    """All its tables but that of the promises, some of which are younger than the report."""
    page = DOCS / "reports" / "soak.md"
    found = read(page)
    found["end"].setdefault("recorded", [])
    found["samples"] = [defaultdict(float, sample) for sample in found["samples"]]
    made = dict(sections(soak_report.page(found, "soak")))
    shown = dict(sections(page.read_text("utf-8")))
    assert made.keys() == shown.keys()
    for heading in made.keys() - {"", "Promises"}:
        missing = set(shown[heading].splitlines()) - set(made[heading].splitlines())
        # What these rows count has changed since.
        assert all("Redis" in row or "processes share" in row for row in missing)
