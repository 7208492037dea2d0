"""The path table of steering/README.md names files and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import steering

ROOT = Path(steering.__file__).parent.parent
README = (ROOT / "steering" / "README.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| \d+ [\w ]+ \| `([^`]+)` \| `([^`]+)` \|", README, re.MULTILINE)
BESIDE = README.partition("## Files beside the path")[2]
FILES = re.findall(r"`([\w/]+\.py)`", BESIDE)
FOLDERS = re.findall(r"`(worker/\w+)/`", BESIDE)


def test_the_tables_are_found() -> None:
    assert len(STEPS) == 13
    assert len(FILES) == 14
    here = {f"worker/{p.parent.name}" for p in (ROOT / "steering/worker").glob("*/__init__.py")}
    assert {*FOLDERS} == here


@pytest.mark.parametrize(("file", "name"), STEPS)
def test_each_step_exists(file: str, name: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(async def|def|class) {name}\b", source, re.MULTILINE)


@pytest.mark.parametrize("file", FILES)
def test_each_other_file_exists(file: str) -> None:
    assert (ROOT / "steering" / file).is_file()
