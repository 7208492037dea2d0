"""Makes the screenshots of docs/guide/playground.md: `make pictures`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser import chromium, opened

FOLDER = Path(__file__).parents[1] / "docs" / "images"


def compare(page: Page) -> None:
    """A steered answer, one of its tokens looked into."""
    page.get_by_label("Profile or method").select_option("method:proxy_tuning")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#said")).to_have_text(re.compile("^Done"))
    page.locator(".token.changed").first.hover()


def values(page: Page) -> None:
    """Small talk, drawn towards sunny words by a value model."""
    page.get_by_label("Profile or method").select_option("profile:cheerful")
    page.get_by_label("Text", exact=True).check()
    page.get_by_label("Prompt", exact=True).fill("The old baker")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#said")).to_have_text(re.compile("^Done"))
    page.locator(".token.changed").nth(2).hover()


def routing(page: Page) -> None:
    """Where a pack's gates sent the tokens."""
    page.get_by_label("Profile or method").select_option("none:adapters only")
    page.get_by_label("Prompt", exact=True).fill("For the register: Dorwyn Bramley.")
    page.locator("#adapters-fold summary").click()
    page.get_by_role("checkbox", name=re.compile("^pack")).check()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#said")).to_have_text(re.compile("^Done"))


def administration(page: Page) -> None:
    """Adapters, profiles, streams."""
    page.get_by_role("button", name="Administration").click()
    expect(page.get_by_role("heading", name="Streams")).to_be_visible()


def real(page: Page) -> None:
    """A text against what SmolLM2 remembers; the second stream reads the last line alone."""
    page.get_by_label("Text", exact=True).check()
    page.get_by_label("Profile or method").select_option("method:context_aware")
    page.get_by_label("Prompt", exact=True).fill(f"{MOVED}\n\n{ASKED}")
    page.get_by_label("Strength, exact").fill("1")
    page.get_by_label("twin", exact=True).fill(ASKED)
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("Tokens at most, exact").fill("24")
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#said")).to_have_text(re.compile("^Done"), timeout=60_000)
    page.locator(".token.changed").first.hover()


MOVED = "In 2041 the parliament of Italy moved the country's capital from Rome to Milan."
ASKED = "The capital of Italy is"

PICTURES = {
    "playground-light": ("light", compare),
    "playground-dark": ("dark", values),
    "playground-routing": ("light", routing),
    "playground-admin": ("dark", administration),
}

REAL = {"playground-smollm": ("light", real)}
"""Of `make smollm`."""


def main() -> None:
    """Asks the server at `--url`, and writes one PNG for each picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.pictures", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--real", action="store_true", help="those of `make smollm`")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, (scheme, prepare) in (REAL if given.real else PICTURES).items():
            with opened(browser, given.url, color_scheme=scheme) as page:
                prepare(page)
                page.screenshot(path=given.folder / f"{name}.png", full_page=True)


if __name__ == "__main__":
    main()
