"""The playground of a server with keys: it opens nothing that a key does not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from playwright.sync_api import Browser, expect
from transformers import AutoModelForCausalLM

from tests.adapters.vectors import Change, changes_of_states, make_vector
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


@contextmanager
def loaded(server: Server, name: str, folder: Path) -> Iterator[None]:
    """An adapter, for as long as a test needs it."""
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        body = {"name": name, "source": str(folder)}
        assert client.post("/admin/adapters", json=body).is_success
        until = time.monotonic() + 60
        while client.get(f"/admin/adapters/{name}").json()["state"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.1)
        try:
            yield
        finally:
            client.delete(f"/admin/adapters/{name}")


def log_probs(
    model: Path, ids: list[int], reply: int, changes: dict[int, Change], weight: float
) -> torch.Tensor:
    """[reply, V] of the last tokens, from transformers with hooks in float64."""
    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)

    def added(change: Change) -> Any:
        def hook(_module: object, _inputs: object, states: torch.Tensor) -> torch.Tensor:
            return states + weight * change(states)

        return hook

    for layer, change in changes.items():
        found.model.layers[layer].register_forward_hook(added(change))
    with torch.no_grad():
        scores = found(torch.tensor([ids])).logits[0].log_softmax(-1)
    return scores[-reply - 1 : -1]


def test_each_token_tells_what_a_vector_changed(
    browser: Browser, keyed: Server, models: Path
) -> None:
    prompt, weight = "How is the weather today?", 1.5
    calm = make_vector(models / "keyed" / "calm", 128, [0, 1], seed=70, size=0.2)
    body = {"model": "big", "prompt": prompt, "max_tokens": 12, "temperature": 0,
            "return_token_ids": True, "adapters": [{"name": "calm", "weight": weight}]}  # fmt: skip
    with loaded(keyed, "calm", calm), opened(browser, keyed.url) as page:
        page.get_by_label("API key").fill(FULL)
        page.get_by_role("button", name="Use").click()
        expect(page.get_by_role("button", name="Run")).to_be_enabled()
        page.get_by_label("Text", exact=True).check()
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_label("Profile or method").select_option("none:adapters only")
        page.locator("#adapters-fold summary").click()
        page.get_by_role("slider", name="Weight of calm").fill(str(weight))
        page.get_by_text("Sampling").click()
        page.get_by_role("spinbutton", name="Tokens at most, exact").fill("12")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#said")).to_have_text(re.compile("^Done"))
        answer = httpx.post(f"{keyed.url}/v1/completions", json=body, timeout=60,
                            headers={"authorization": f"Bearer {FULL}"}).json()  # fmt: skip
        choice = answer["choices"][0]
        reply: list[int] = choice["token_ids"]
        ids = [*choice["prompt_token_ids"], *reply]
        changes, base = changes_of_states(calm), models / "base"
        with_it = log_probs(base, ids, len(reply), changes, weight)
        without = log_probs(base, ids, len(reply), {}, weight)
        at = torch.arange(len(reply))
        moves = (with_it - without)[at, torch.tensor(reply)].tolist()
        assert max(map(abs, moves)) > 0.1
        tokens = page.get_by_role("option").all()[-len(reply) :]
        panel = page.get_by_role("region", name="Token", exact=True)
        for i, (token, move) in enumerate(zip(tokens, moves, strict=True)):
            token.hover()
            expect(panel).to_contain_text(f"token {i + 1} of {len(reply)}")
            told = re.search(r"\(([+−])([\d.]+) nats\)", panel.inner_text())
            assert told is not None
            sign = -1 if told[1] == "−" else 1
            assert sign * float(told[2]) == pytest.approx(move, abs=1e-3)
            classes = (token.get_attribute("class") or "").split()
            assert ("changed" in classes) == (without[i].argmax().item() != reply[i])
            assert ("up" in classes) == (move >= 0.02) and ("down" in classes) == (move <= -0.02)
        mean = sum(moves) / len(moves)
        shown = page.locator("#report dl div", has_text="By vectors").locator("dd").inner_text()
        assert float(shown.split()[0].replace("−", "-")) == pytest.approx(mean, abs=6e-3)
