"""The page of recipes is what its tables say, and what they say is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.where import read_where
from steering.plugins import discover
from tests.recipes import page, rules, table_rules, table_vectors, vectors
from tests.recipes.row import Recipe, ascii_of

ROOT = Path(__file__).parents[2]
METHODS = discover()


def test_the_page_is_what_the_tables_say() -> None:
    made = page.PAGE.read_text("utf-8")
    assert made == page.page(), "run: python -m tests.recipes.page"


def test_every_row_is_on_the_page_once() -> None:
    names = [row.name for row in page.RECIPES]
    assert len(set(names)) == len(names) == len(page._MADE)
    for name in page.ORDER:
        assert any(row.startswith(name) for row in names), name


def test_every_formula_has_its_row() -> None:
    assert [row.name for row in table_rules.RECIPES] == list(rules.HERE)
    assert [row.name for row in table_vectors.ROWS] == list(vectors.RECIPES)


@pytest.mark.parametrize("row", page.RECIPES, ids=lambda row: ascii_of(row.name))
def test_its_fields_say_something(row: Recipe) -> None:
    for value in (row.formula, row.request, row.artefacts, row.passes, row.licence):
        assert value and not value.endswith(".")
    assert row.source.replace(".", "", 1).isdecimal()


@pytest.mark.parametrize("row", page.RECIPES, ids=lambda row: ascii_of(row.name))
def test_its_request_is_understood(row: Recipe) -> None:
    asked = json.loads(row.request)
    if "adapters" in asked:
        for use in asked["adapters"]:
            if "where" in use:
                read_where(use["where"], "where")
        return
    METHODS[asked["method"]].config.model_validate(asked)


def test_its_test_is_there(request: pytest.FixtureRequest) -> None:
    """Collected in this process: one parameter at a time, as pytest names it."""
    there = set()
    for file in sorted({row.test.partition("::")[0] for row in page.RECIPES}):
        module = pytest.Module.from_parent(request.session, path=ROOT / file)
        there |= {item.nodeid for item in module.collect()}
        there |= {item.nodeid.partition("[")[0] for item in module.collect()}
    for row in page.RECIPES:
        assert row.test in there, row.test
