"""The tables of steering/README.md name files and folders that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import steering

ROOT = Path(steering.__file__).parent.parent
README = (ROOT / "steering" / "README.md").read_text(encoding="utf-8")
FILES = re.findall(r"`([\w/]+\.py)`", README)
FOLDERS = re.findall(r"`(worker/\w+)/`", README)


def test_the_tables_are_found() -> None:
    assert len(FILES) >= 19
    here = {f"worker/{p.parent.name}" for p in (ROOT / "steering/worker").glob("*/__init__.py")}
    assert {*FOLDERS} == here


@pytest.mark.parametrize("file", FILES)
def test_each_file_exists(file: str) -> None:
    assert (ROOT / "steering" / file).is_file()
