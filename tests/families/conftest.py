"""`make families` writes the page's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.table import Row, into

ROWS = pytest.StashKey[dict[str, Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-table", type=Path, help="a page to write the facts into")


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    """What was measured, by family; tests add to it."""
    return request.config.stash.setdefault(ROWS, {})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--families-table", None)
    if path is not None and exitstatus == 0:
        path.write_text(into(path.read_text(), session.config.stash.get(ROWS, {})))
