"""The documentation cannot lie about names: links, files, functions, methods, figures of cost."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering.plugins import BUILT_INS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
READMES = [ROOT / folder / "README.md" for folder in (".", "steering", "zoo", "examples")]
FORGE = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted([*READMES, *FORGE, *DOCS.rglob("*.md")])
CODE = (
    "server", "steering", "adapters", "zoo", "tests", "load_tests", "deploy", "docs", "examples",
)  # fmt: skip
METHODS = sorted(BUILT_INS)
METHODS_INDEX = DOCS / "guide" / "methods" / "README.md"
METHOD_PAGES = sorted(set(METHODS_INDEX.parent.glob("*.md")) - {METHODS_INDEX})
UNLISTED = ("methods", "decisions")
"""Folders whose pages the index need not name one by one."""


def text_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """For a test's id."""
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What links may name on a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.replace("`", "")).lower().replace(" ", "-") for h in headings}


def section(page: Path, title: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text_of(page), re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page.name} lacks the section {title}"
    return found[1].strip("\n")


def test_the_makefile_has_each_target_once() -> None:
    """Make takes the last recipe of several, with a warning: `make check` once checked nothing."""
    made = subprocess.run(
        ["make", "-n", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert made.stderr == ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_merge_left_its_marks(page: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}|={7}$)", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_cited_files_are_there(page: Path) -> None:
    """Whatever stands in backticks and begins with one of our folders."""
    for cited in re.findall(r"`((?:\w[\w.-]*/)+[\w.-]*)`", text_of(page)):
        if cited.split("/")[0] not in CODE:
            continue
        near = [ROOT / cited, page.parent / cited]
        assert any(path.exists() for path in near), cited


def cited_functions() -> Iterator[tuple[str, str, str]]:
    """(page, file, name) of every table row that begins with a file and a name."""
    for page in PAGES:
        found = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", text_of(page), re.MULTILINE)
        for file, name in found:
            yield name_of(page), file, name


CITED = sorted(set(cited_functions()))


def test_the_traced_request_is_found() -> None:
    assert len([row for row in CITED if row[0] == "docs/internals/architecture.md"]) > 20


@pytest.mark.parametrize(("page", "file", "name"), CITED)
def test_cited_functions_are_there(page: str, file: str, name: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(async def|def|class) {name}\b", source, re.MULTILINE), (page, name)


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    linked = {(DOCS / link).resolve() for link in re.findall(r"\]\(([\w./-]+\.md)\)", index)}
    listed = {page for page in DOCS.rglob("*.md") if page.parent.name not in UNLISTED}
    assert listed - {DOCS / "README.md"} <= linked
    for folder in (METHODS_INDEX.parent, DOCS / "internals" / "decisions"):
        links = re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text("utf-8"))
        assert set(folder.glob("*.md")) - {folder / "README.md"} <= {folder / one for one in links}


def test_every_method_has_a_page_and_a_row() -> None:
    titles = [page.read_text("utf-8").split("\n")[0] for page in METHOD_PAGES]
    assert sorted(re.findall(r"`(\w+)`", " ".join(titles))) == METHODS
    rows = re.findall(r"\| `(\w+)` \|", METHODS_INDEX.read_text("utf-8"))
    assert sorted(rows) == METHODS


@pytest.mark.parametrize("page", METHOD_PAGES, ids=name_of)
def test_a_method_page_says_formula_use_request_and_cost(page: Path) -> None:
    assert re.search(r"^    \S+", section(page, "Formula"), re.MULTILINE), "no formula"
    for title in ("When", "Cost"):
        assert len(section(page, title)) > 80
