"""The reference pages are what the code says."""

from __future__ import annotations

import pytest

from tests.docs.reference import FOLDER, PAGES, Schema, openapi


@pytest.fixture(scope="module")
def schema() -> Schema:
    return openapi()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str, schema: Schema) -> None:
    made = PAGES[name](schema)
    assert made == (FOLDER / name).read_text("utf-8"), "run: make reference"
