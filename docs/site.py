"""Hooks of MkDocs: the navigation comes from the index, links may leave `docs/`.

MkDocs calls these by name (https://www.mkdocs.org/dev-guide/plugins/#events).
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

LOG = logging.getLogger("mkdocs.hooks.site")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Sets the navigation: each heading of `docs/README.md` with the pages that it links."""
    docs = Path(config.docs_dir)
    nav: list[Any] = [{"Home": "README.md"}]
    for section in re.split(r"^## ", (docs / "README.md").read_text("utf-8"), flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        links = [link[3] for link in LINK.finditer(body)]
        # Files outside docs/, as the changelog, are links on the page and no pages of the site.
        nav.append({title: [entry(docs, link) for link in links if not link.startswith("../")]})
    config.nav = nav
    return config


def entry(docs: Path, link: str) -> Any:
    """A page, or a page and the others of its folder where the link is to a folder's index."""
    if Path(link).name != "README.md":
        return link
    folder = Path(link).parent
    others = sorted(p.name for p in (docs / folder).glob("*.md") if p.name != "README.md")
    if not others:
        return link
    title = (docs / link).read_text("utf-8").partition("\n")[0].removeprefix("# ")
    return {title: [link, *(f"{folder}/{name}" for name in others)]}


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replaces a link to a file outside `docs/`: by the repository's page of it, else by its text.

    A target that does not exist is a warning, which ends a strict build.
    """
    docs = Path(config.docs_dir).resolve()
    here = (docs / page.file.src_path).parent

    def outside(link: re.Match[str]) -> str:
        image, text, path, anchor = link.groups()
        target = Path(os.path.normpath(here / path))
        if target.is_relative_to(docs) and not (target.is_dir() and not image):
            return link[0]
        if not target.exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_path, path)
        if config.repo_url:
            place = target.relative_to(docs.parent).as_posix()
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{place}{anchor or ''})"
        return text

    # Code blocks stay as they are.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.M)
    return "".join(p if p.startswith("```") else LINK.sub(outside, p) for p in parts)
