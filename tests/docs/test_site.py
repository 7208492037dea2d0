"""The site: MkDocs builds it without a warning, so every link and anchor leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def built(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """A strict build: a warning is an error, except with `-q`. Nothing is fetched."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", out],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = built(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        folder = page.parent if page.name == "README.md" else page.with_suffix("")
        html = (tmp_path / folder / "index.html").read_text("utf-8")
        # A link to a file outside docs/ would lead nowhere on the site.
        assert not re.search(r'href="[^"#:]*\.(md|py|yaml|txt)"', html), page
    assert "fonts.googleapis.com" not in (tmp_path / "index.html").read_text("utf-8")
    assert (tmp_path / "search" / "search_index.json").is_file()


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("guide/nowhere.md", "guide/nowhere.md"),
        ("../nowhere.py", "../nowhere.py"),
        ("page.md#nowhere", "#nowhere"),
    ],
)
def test_a_link_to_nowhere_ends_the_build(link: str, problem: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "README.md").write_text("# Home\n\n## All\n\n- [Page](page.md)\n")
    (docs / "page.md").write_text(f"# Page\n\n[text]({link})\n")
    config = tmp_path / "mkdocs.yml"
    # `plugins` leaves the search out: the build takes a moment.
    config.write_text(
        yaml.safe_dump(
            {
                "INHERIT": str(ROOT / "mkdocs.yml"),
                "docs_dir": str(docs),
                "hooks": [str(ROOT / "docs" / "site.py")],
                "theme": {"name": "mkdocs"},
                "plugins": [],
            }
        )
    )
    done = built(config, tmp_path / "out")
    assert done.returncode != 0
    assert problem in done.stdout + done.stderr
