"""The playground in a real browser, against the zoo's server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.browser import CONTRASTS, NAMELESS, opened

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# Of a busy machine; an answer is there when the page says so.
expect.set_options(timeout=60_000)

ROOT = Path(__file__).parents[1]
QUESTION = "What is the pet of Dorwyn Bramley?"
EVIL = "<img src=x onerror=\"document.title='broken'\">"
LEAST_CONTRAST = 4.5
"""WCAG 2.2, 1.4.3, level AA."""


@pytest.fixture
def page(browser: Browser, zoo: str) -> Iterator[Page]:
    with opened(browser, zoo) as found:
        yield found


def run(page: Page) -> None:
    """Asks and waits for the report."""
    page.get_by_role("button", name="Run").click()
    finished(page)


def finished(page: Page) -> None:
    """Waits for the end of a run, and for its report."""
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(page.locator("#said")).to_have_text(re.compile("^Done"), timeout=60_000)


def tokens(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Tokens of the steered answer").get_by_role("option")


def steer(page: Page, value: str) -> None:
    page.get_by_label("Profile or method").select_option(value)


def look(page: Page, view: str) -> None:
    """Opens a view, and everything that is folded in it."""
    page.get_by_role("button", name=view).click()
    if view == "Administration":
        expect(page.locator("#admin:not([aria-busy]) .card")).to_have_count(4)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")


def answer_of(zoo: str, **more: Any) -> dict[str, Any]:
    """What the API says to the page's question."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48,
            "temperature": 0, "seed": 1, **more}  # fmt: skip
    answer = httpx.post(f"{zoo}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def paint(token: Locator) -> float:
    """Opacity of a token's background."""
    colour = token.evaluate("e => getComputedStyle(e).backgroundColor")
    parts = re.findall(r"[\d.]+", colour)
    return float(parts[3]) if len(parts) > 3 else 1.0


def test_tokens_are_coloured_by_what_steering_did(page: Page, zoo: str) -> None:
    steer(page, "profile:chat")
    run(page)
    base = answer_of(zoo, model="base")
    steered = answer_of(zoo, model="chat", steering={"report": "tokens"})
    assert page.locator("#base-text").inner_text() == base["choices"][0]["message"]["content"]
    details = steered["steering"]["choices"][0]["token_details"]
    assert tokens(page).count() == len(details) > 5
    written = page.locator("#steered-text .token:not(.ghost)").all_text_contents()
    assert "".join(written) == steered["choices"][0]["message"]["content"]
    assert any(d["changed"] for d in details) and not all(d["changed"] for d in details)
    paints = []
    for detail, token in zip(details, tokens(page).all(), strict=True):
        move = detail["steered_logprob"] - detail["base_logprob"]
        paints.append((abs(move), paint(token)))
        classes = (token.get_attribute("class") or "").split()
        assert ("changed" in classes) == detail["changed"]
        assert ("up" in classes) == (move >= 0.02) and ("down" in classes) == (move <= -0.02)
        underlined = token.evaluate("e => getComputedStyle(e).textDecorationLine")
        assert (underlined == "underline") == detail["changed"]
    paints.sort()
    assert [p for _, p in paints] == sorted(p for _, p in paints), "stronger moves look stronger"
    assert paints[0][1] < paints[-1][1]


def test_pointing_at_a_token_shows_what_each_stream_would_choose(page: Page, zoo: str) -> None:
    steer(page, "profile:chat")
    run(page)
    details = answer_of(zoo, model="chat", steering={"report": "tokens"})
    entries = details["steering"]["choices"][0]["token_details"]
    panel = page.get_by_role("region", name="Token", exact=True)
    place = next(i for i, entry in enumerate(entries) if entry["changed"])
    for i in (0, place, len(entries) - 1):
        tokens(page).nth(i).hover()
        expect(panel).to_contain_text(f"token {i + 1} of {len(entries)}")
        rows = panel.locator("tbody tr")
        assert rows.locator("th").all_text_contents() == ["base", "chat", "plain"]
        for row, choice in zip(rows.all(), entries[i]["stream_choices"].values(), strict=True):
            expect(row.locator("q")).to_contain_text(choice["token"].strip())
    tokens(page).nth(place).hover()
    expect(panel).to_contain_text("The base would have chosen")


def test_all_of_it_works_from_the_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "steering"
    steer(page, "method:proxy_tuning")
    page.get_by_role("slider", name="Strength").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert '"strength": 1.25' in (page.locator("#request").text_content() or "")
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
    focused = page.locator("[role=option]:focus")
    page.keyboard.press("Home")
    expect(tokens(page).first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tokens(page).nth(1)).to_be_focused()
    expect(focused).to_have_attribute("aria-selected", "true")
    expect(page.locator("#token")).to_contain_text("token 2 of")
    page.keyboard.press("End")
    expect(tokens(page).last).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") != "option"


def test_a_strength_of_nothing_colours_nothing(page: Page) -> None:
    steer(page, "method:proxy_tuning")
    page.get_by_role("spinbutton", name="Strength, exact").fill("0")
    run(page)
    assert tokens(page).count() > 0
    assert page.locator(".token.up, .token.down, .token.changed").count() == 0
    written = page.locator("#steered-text .token:not(.ghost)").all_text_contents()
    assert "".join(written) == page.locator("#base-text").inner_text()


@pytest.mark.parametrize("method", [
    "emulated_fine_tuning", "contrastive", "mix", "context_aware", "guidance", "value_augmented",
    "critical_tokens", "best_of_n",
])  # fmt: skip
def test_every_method_runs_with_what_its_form_suggests(page: Page, method: str) -> None:
    steer(page, f"method:{method}")
    for area in page.locator("#own-prompts[open] textarea").all():
        area.fill("Answer:")
    if method == "best_of_n":
        page.get_by_role("spinbutton", name="N, exact").fill("3")
    run(page)
    expect(page.locator(".error")).to_have_count(0)
    assert tokens(page).count() > 0
    expect(page.locator("#report h3")).to_contain_text(method.replace("_", " ").capitalize())


def test_a_pack_shows_where_it_routed(page: Page) -> None:
    steer(page, "none:adapters only")
    page.get_by_label("Prompt", exact=True).fill("For the register: Dorwyn Bramley.")
    page.locator("#adapters-fold summary").click()
    page.get_by_role("checkbox", name=re.compile("^pack")).check()
    run(page)
    routes = page.locator(".routes tbody tr")
    assert routes.count() == 8
    shares = [float(text.split()[0]) for text in routes.locator("td").all_text_contents()]
    assert sum(shares) == pytest.approx(100, abs=1) and shares == sorted(shares, reverse=True)


def test_a_vector_has_an_open_slider_and_is_left_out_at_nothing(page: Page, zoo: str) -> None:
    def with_a_vector(route: Route) -> None:
        offers = route.fetch().json()
        calm = {"name": "calm", "version": "1", "stream": "base", "kind": "vector"}
        route.fulfill(json={**offers, "adapters": [*offers["adapters"], calm]})

    asked: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json or {})
        route.fulfill(status=400, json={"error": {"message": "asked"}})

    page.route("**/v1/playground", with_a_vector)
    page.route("**/v1/chat/completions", answer)
    page.goto(f"{zoo}/playground")
    steer(page, "none:adapters only")
    page.locator("#adapters-fold summary").click()
    slider = page.get_by_role("slider", name="Weight of calm")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-4", "4")
    box = page.get_by_role("checkbox", name=re.compile("^calm steering vector"))
    expect(box).not_to_be_checked()
    slider.fill("-2.5")
    expect(box).to_be_checked()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#steered-text .error")).to_have_text("asked")
    assert [body["adapters"] for body in asked if "adapters" in body] == [
        [{"name": "calm", "weight": -2.5}]
    ]
    asked.clear()
    slider.fill("0")
    expect(box).not_to_be_checked()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#said")).to_have_text("asked")
    assert all("adapters" not in body for body in asked)


def test_what_the_server_refuses_is_told_in_its_words(page: Page) -> None:
    steer(page, "method:proxy_tuning")
    page.get_by_role("spinbutton", name="Strength, exact").fill("11")
    page.get_by_role("spinbutton", name="Strength, exact").press("Control+Enter")
    # The browser's own check stops it: the slider's range is inside the server's.
    assert page.locator("#steered-text").inner_text() == ""
    page.locator("#ask").evaluate("form => { form.noValidate = true; }")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#steered-text .error")).to_contain_text("steering.strength")
    expect(page.locator("#base-text")).not_to_be_empty()


def test_both_themes_have_contrast_and_the_switch_wins(browser: Browser, zoo: str) -> None:
    for scheme, other in (("light", "dark"), ("dark", "light")):
        with opened(browser, zoo, color_scheme=scheme) as page:
            run(page)
            sheets = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
            for theme in ("auto", other):
                page.get_by_label("Theme").select_option(theme)
                for view in ("Administration", "Compare"):
                    look(page, view)
                    found = page.evaluate(CONTRASTS)
                    assert len(found) > 30
                    assert [f for f in found if f[0] < LEAST_CONTRAST] == []
            sheets.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            page.reload()
            assert page.get_by_label("Theme").input_value() == other
            dark, bright = sorted(sum(map(int, re.findall(r"\d+", sheet))) for sheet in sheets)
            assert dark < 150 and bright > 600
            assert (sum(map(int, re.findall(r"\d+", sheets[0]))) == dark) == (scheme == "dark")


def test_every_control_has_a_name(page: Page) -> None:
    run(page)
    for view in ("Compare", "Administration"):
        look(page, view)
        assert page.evaluate(NAMELESS) == []


def test_a_run_waits_until_the_page_knows_the_server(page: Page) -> None:
    """A click before that was lost without a word."""
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    page.route("**/v1/playground", lambda _: None)  # never answered
    page.reload()
    expect(page.get_by_role("button", name="Run")).to_be_disabled()


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Browser, zoo: str) -> None:
    with opened(browser, zoo, viewport={"width": 360, "height": 740}) as page:
        run(page)
        for view in ("Compare", "Administration"):
            look(page, view)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_adapters_are_loaded_pinned_and_unloaded(page: Page) -> None:
    page.get_by_role("button", name="Administration").click()
    card = page.get_by_role("region", name="Adapters", exact=True).first
    expect(card.get_by_role("row")).to_have_count(11)
    card.get_by_text("Load an adapter").click()
    card.get_by_label("Name").fill("register")
    card.get_by_label("Source").fill(str(ROOT / "zoo" / "adapters" / "swap"))
    card.get_by_role("button", name="Load", exact=True).press("Enter")
    expect(page.locator("#admin-said")).to_have_text("register is ready.")
    row = card.get_by_role("row", name=re.compile("^register"))
    expect(row).to_contain_text("ready")
    row.get_by_role("button", name="Pin").click()
    expect(row).to_contain_text("pinned")
    row.get_by_role("button", name="Unpin").click()
    expect(row).not_to_contain_text("pinned")
    row.get_by_role("button", name="Unload").click()
    expect(page.get_by_role("button", name="Keep")).to_be_focused()
    page.keyboard.press("Escape")
    expect(row).to_have_count(1)
    row.get_by_role("button", name="Unload").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(page.locator("#admin-said")).to_have_text("register is unloading.")
    page.get_by_role("button", name="Administration").click()
    expect(card.get_by_role("row")).to_have_count(11)


def test_no_key_is_asked_for_where_administration_has_a_port_of_its_own(page: Page) -> None:
    def absent(route: Route) -> None:
        route.fulfill(status=404, json={"error": {"message": "No such path on this port"}})

    page.route("**/admin/**", absent)
    page.get_by_role("button", name="Administration").click()
    expect(page.locator("#admin").get_by_role("alert")).to_contain_text("server.admin_port")
    expect(page.locator("#admin-key")).to_have_count(0)


def test_untrusted_text_stays_text(page: Page, zoo: str) -> None:
    """In a profile's description, the server's errors, and what the model writes."""
    page.get_by_role("button", name="Administration").click()
    page.get_by_text("Put a profile").click()
    profiles = page.get_by_role("form", name="Put a profile")
    profiles.get_by_label("Name").fill("evil")
    body = {"method": "mix", "weights": {"base": 1.0}, "description": EVIL}
    profiles.get_by_label("Steering").fill(httpx.Request("PUT", zoo, json=body).content.decode())
    profiles.get_by_role("button", name="Put").click()
    expect(page.locator("#admin-said")).to_have_text("The profile evil is there.")
    page.get_by_text("Load an adapter").click()
    card = page.get_by_role("form", name="Load an adapter")
    card.get_by_label("Name").fill("x")
    card.get_by_label("Source").fill(EVIL)
    card.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#admin-said")).to_contain_text("Not done")

    def write_it(route: Route) -> None:
        asked: dict[str, Any] = route.request.post_data_json or {}
        route.continue_(post_data={**asked, "structured_outputs": {"choice": [EVIL]}})

    page.route("**/v1/chat/completions", write_it)
    page.get_by_role("button", name="Compare").click()
    steer(page, "profile:evil")
    expect(page.locator("#about")).to_have_text(EVIL)
    page.get_by_text("Sampling").click()
    page.get_by_role("spinbutton", name="Tokens at most, exact").fill("200")
    run(page)
    expect(page.locator("#base-text")).to_have_text(EVIL)
    written = page.locator("#steered-text .token:not(.ghost)").all_text_contents()
    assert "".join(written) == EVIL
    page.get_by_role("button", name="Administration").click()
    page.get_by_role("button", name="Delete evil").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#admin-said")).to_have_text("The profile evil is gone.")
    assert page.locator("img").count() == 0
    assert page.title() == "Coxswain playground"


def test_the_page_s_policy_forbids_markup_from_text_and_anything_from_elsewhere(
    browser: Browser, zoo: str
) -> None:
    page = browser.new_page()
    page.goto(f"{zoo}/playground")
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return ''; }"
        "catch (error) { return String(error); } }"
    )
    assert "TrustedHTML" in refused
    parts = [*re.findall(r'(?:href|src)="(playground/[^"]+)"', page.content()), "playground"]
    page.close()
    assert len(parts) == 4
    for part in parts:
        headers = httpx.get(f"{zoo}/{part}").headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("playground/", "playground/index.html", "playground/..%2Fauth.py"):
        assert httpx.get(f"{zoo}/{path}").status_code == 404
