"""Headless Chromium for tests of the playground, and what they ask of a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MS = 120_000
"""For an answer: other work may share the cores."""

_FLAGS = (
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

CONTRASTS = """
() => {
  const parse = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return { rgb: parts.slice(0, 3).map((v) => v * scale), a: parts[3] ?? 1 };
  };
  const over = (top, below) => top.rgb.map((v, i) => v * top.a + below[i] * (1 - top.a));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => {
      const share = v / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.push(parse(getComputedStyle(at).backgroundColor));
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const typed = "textarea, select, input:not([type=range], [type=checkbox], [type=radio])";
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const exempt = element.closest(".unseen, .skip, :disabled, option, optgroup");
    if (exempt || !element.checkVisibility() || !(own || element.matches(typed))) continue;
    const below = behind(element);
    const ink = over(parse(getComputedStyle(element).color), below);
    const [dim, bright] = [light(ink), light(below)].sort((a, b) => a - b);
    const what = `${element.tagName}: ${element.textContent.slice(0, 40)}`;
    found.push([(bright + 0.05) / (dim + 0.05), what]);
  }
  return found;
}
"""
"""[ratio, what] of every element that shows text, by WCAG's formula; disabled ones are exempt."""

NAMELESS = """
() => {
  const named = (one) => one.getAttribute("aria-label")?.trim()
    || (one.matches("button, [role=option]") && one.textContent)
    || [...(one.labels ?? [])].some((label) => label.textContent.trim());
  const all = document.querySelectorAll("button, input, select, textarea, [role=option]");
  return [...all].filter((one) => one.checkVisibility() && !named(one))
    .map((one) => one.outerHTML.slice(0, 120));
}
"""
"""Visible controls that a screen reader could not name."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where none is installed."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip(f"needs a browser: one of {', '.join(PROGRAMS)} (Debian's package `chromium`)")
    # Chromium's sandbox refuses to run as root.
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """The playground of a server, in a context of its own.

    Fails afterwards if the page asked for anything elsewhere, or wrote an error to the console.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    elsewhere: list[str] = []
    errors: list[str] = []

    def asked(request: Request) -> None:
        if not request.url.startswith(f"{url}/"):
            elsewhere.append(request.url)

    page.on("request", asked)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    try:
        page.goto(f"{url}/playground")
        yield page
    finally:
        context.close()
    assert elsewhere == []
    # Chromium writes every answer of 400 and more to the console.
    assert [error for error in errors if "Failed to load resource" not in error] == []
