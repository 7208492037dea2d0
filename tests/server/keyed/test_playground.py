"""The playground of a server with keys: it opens nothing that a key does not."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.browser import opened
from tests.server.keyed.conftest import ADMIN, FULL, LIMITED
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def offers(server: Server, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}/v1/playground", headers=headers, timeout=30)


@pytest.mark.parametrize("key", [None, "nonsense", ADMIN])
def test_without_an_api_key_there_is_the_page_and_nothing_else(
    keyed: Server, key: str | None
) -> None:
    assert offers(keyed, key).status_code == 401
    page = httpx.get(f"{keyed.url}/playground")
    assert page.status_code == 200
    for name in ("big-chat", "twin", "preload"):
        assert name not in page.text


def test_a_key_is_offered_what_it_may_use(keyed: Server) -> None:
    full: dict[str, Any] = offers(keyed, FULL).json()
    assert full["own_methods"] and full["options"]
    assert [p["name"] for p in full["profiles"]] == ["big-chat", "own"]
    assert {s["name"]: s["same_as"] for s in full["streams"]} == {
        "base": None, "chat": None, "plain": None, "twin": "base",
    }  # fmt: skip
    assert {a["name"]: a["kind"] for a in full["adapters"]} == {"a": "lora", "pack": "meteora"}
    limited: dict[str, Any] = offers(keyed, LIMITED).json()
    assert not limited["own_methods"] and limited["streams"] == []
    assert [p["name"] for p in limited["profiles"]] == ["own"]
    assert [a["name"] for a in limited["adapters"]] == ["a"]


def test_texts_of_a_profile_are_not_offered(keyed: Server) -> None:
    """Prompts and templates are the operator's."""
    for key in (FULL, LIMITED):
        told = offers(keyed, key)
        assert "assistant:" not in told.text
        assert "<|user|>" not in told.text
        assert "prompts" not in str(told.json()["profiles"])


def test_the_page_asks_for_keys_and_forgets_them(browser: Browser, keyed: Server) -> None:
    with opened(browser, keyed.url) as page:
        expect(page.locator("#trouble")).to_contain_text("wants an API key")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("nonsense")
        page.keyboard.press("Enter")
        expect(page.locator("#trouble")).to_be_visible()
        page.get_by_label("API key").fill(LIMITED)
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#trouble")).to_be_hidden()
        names = page.locator("#steering option").all_text_contents()
        assert names == ["own", "adapters only"]
        page.get_by_label("Text", exact=True).check()
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#said")).to_have_text(re.compile("^Done"))
        assert page.get_by_role("option").count() > 3
        page.get_by_role("button", name="Administration").click()
        expect(page.locator("#admin")).to_contain_text("The admin key is required")
        page.get_by_label("Admin key").fill(FULL)
        page.get_by_role("button", name="Open").click()
        expect(page.locator("#admin")).to_contain_text("not the admin key")
        page.get_by_label("Admin key").fill(ADMIN)
        page.get_by_role("button", name="Open").click()
        expect(page.locator("#admin").get_by_role("rowheader", name="pack")).to_be_visible()
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
        assert not any(key in kept for key in (FULL, LIMITED, ADMIN))
        assert page.context.cookies() == []
        page.reload()
        expect(page.locator("#trouble")).to_contain_text("wants an API key")
