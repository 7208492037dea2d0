"""The table of adapter kinds.

`pytest tests/kinds --kinds-table docs/reference/adapter-kinds.md` writes it once all have passed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.kinds import Case, make_base
from tests.kinds.table import Row, into

_rows: dict[str, Row] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that writes the page."""
    parser.addoption("--kinds-table", type=Path, help="a page to write the facts into")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes into the page; not from a run in which something failed."""
    path = session.config.getoption("--kinds-table", None)
    if path is not None and exitstatus == 0:
        path.write_text(into(path.read_text("utf-8"), _rows.values()), "utf-8")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows the facts of every run."""
    if _rows:
        terminalreporter.section("adapter kinds")
    for row in _rows.values():
        terminalreporter.line(" | ".join(row.cells()))


@pytest.fixture
def row() -> Callable[[Case], Row]:
    """The row of a case's kind."""
    return lambda case: _rows.setdefault(case.kind, Row(case))


@pytest.fixture(scope="package")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture → the folder of a tiny model."""
    return cache(lambda name: make_base(tmp_path_factory.mktemp(name), name))
