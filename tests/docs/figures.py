"""Published figures and their sources: a comment on the page names the source of each.

<!-- figures
FIGURE | PAGE.md | first cell of a row | head of a column, or its number from 1
FIGURE | PAGE.md | words of the page that hold the figure
FIGURE | FILE.json | path/to/a/number, `*` for every one; medians; `over` divides; a share in %
FIGURE | evidence/CLAIM.json | first cell of a row | head of a column of the claim's tables
-->
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm.evidence.claim import Claim
from smollm.evidence.page import table_lines

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^<!-- figures.*?\n(.*?)^-->$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    """One line of such a comment."""

    page: str
    section: str
    text: str
    source: tuple[str, ...]


def sections(text: str) -> list[tuple[str, str]]:
    """(heading, text) of each part of a page that begins with a heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def figures(page: Path) -> list[Figure]:
    """All that a page names."""
    found = []
    for heading, text in sections(page.read_text("utf-8")):
        for block in BLOCK.findall(text):
            for line in block.splitlines():
                shown, *source = (part.strip() for part in line.split(" | "))
                name = str(page.relative_to(ROOT))
                found.append(Figure(name, heading, shown, tuple(source)))
    return found


def holds(text: str, figure: str) -> bool:
    """Whether a text has exactly this figure; thousands may have a comma or none."""
    text, figure = (re.sub(r"(?<=\d),(?=\d{3})", "", one) for one in (text, figure))
    return re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d]|\.\d)", text) is not None


def visible(text: str) -> str:
    """A text without comments, fenced blocks, code, targets of links and versions."""
    text = re.sub(r"<!--.*?-->|^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text)
    return re.sub(r"\b(Python|PyTorch|vLLM|[Vv]ersion) \d[\d.]*", r"\1", text)


def cells(text: str, row: str, column: str) -> list[str]:
    """The cells below a column's head in the rows that begin with `row`, in all tables."""
    found, head = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        parts = [part.strip() for part in re.split(r"(?<!\\)\|", line.strip("|"))]
        if head is None:
            head = parts
        index = int(column) - 1 if column.isdigit() and column not in head else None
        if index is None and column in head:
            index = head.index(column)
        if parts[0] == row and index is not None and index < len(parts):
            found.append(parts[index])
    return found


def numbers(document: Any, path: str) -> list[float]:
    """The numbers at a path; `*` stands for every entry that has the rest of the path."""
    found: list[Any] = [document]
    for part in path.split("/"):
        following: list[Any] = []
        for one in found:
            if part == "*":
                following += one if isinstance(one, list) else list(one.values())
            elif isinstance(one, dict) and part in one:
                following.append(one[part])
        found = following
    return [float(one) for one in found]


def computed(source: Path, expression: str) -> float:
    """The median of an expression over all rounds of a file."""
    document = json.loads(source.read_text("utf-8"))
    above, over, below = expression.partition(" over ")
    values = numbers(document, above)
    if over:
        values = [a / b for a, b in zip(values, numbers(document, below), strict=True)]
    assert values, expression
    return statistics.median(values)


def problem(figure: Figure) -> str | None:
    """Why a figure is not what its source says; None if it is."""
    source = ROOT / figure.source[0]
    if source.suffix == ".json" and len(figure.source) == 2:
        shown = figure.text.replace(",", "").removesuffix(" %")
        scale = 100 if figure.text.endswith(" %") else 1
        digits = len(shown.partition(".")[2])
        value = f"{scale * computed(source, figure.source[1]):.{digits}f}"
        return None if value == shown else f"{source.name} gives {value}"
    if source.suffix == ".json":
        claim = Claim.read(source)
        text = "\n\n".join("\n".join(table_lines(table)) for table in claim.tables)
    else:
        text = source.read_text("utf-8")
    if len(figure.source) == 2:
        words = " ".join(figure.source[1].split())
        if not holds(words, figure.text):
            return "the words do not hold the figure"
        return None if words in " ".join(visible(text).split()) else "the page lacks these words"
    found = cells(text, *figure.source[1:])
    if not found:
        return "no such row and column"
    return None if any(holds(cell, figure.text) for cell in found) else f"the cell is {found}"
