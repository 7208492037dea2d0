"""The claims on texts and instructions, run against a model that is told what to say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from smollm.evidence import context, instructions, page
from smollm.evidence.asking import Reply
from smollm.evidence.facts import facts
from smollm.evidence.orders import KINDS, SHOTS, orders
from smollm.evidence.work import Work

MODEL = Path(__file__).parents[2] / "zoo" / "models" / "chat-small"
"""Of which only the tokenizer is used."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    @contextmanager
    def server(_self: Work, _config: Any) -> Iterator[str]:
        yield "http://nowhere"

    monkeypatch.setattr(Work, "server", server)
    return Work(MODEL, tmp_path)


def _reply(text: str) -> Reply:
    return Reply(text, True, (1, 2), 0.1, {})


def test_the_claim_on_texts_chooses_on_the_validation_split(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model knows all facts; from a strength of 1 on it follows the text, few-shot earlier."""
    said = {
        item.context: (item.said, item.fact.value)
        for case in context.CASES
        for item in context.items(facts(), case, 0)
    }
    known = {fact.question: fact.value for fact in facts()}
    asked: list[tuple[str, float]] = []

    def replies(_url: str, _path: str, bodies: list[dict[str, Any]]) -> list[Reply]:
        found = []
        for body in bodies:
            strength = body.get("steering", {}).get("strength", 0.0)
            prompt = body["prompt"]
            asked.append((prompt, strength))
            texts = [text for text in said if text in prompt]
            memory = [v for q, v in known.items() if q in prompt]
            if texts and (strength >= 1.0 or "opinion" in prompt):
                found.append(_reply(f" {said[texts[-1]][0]}."))
            else:
                found.append(_reply(f" {memory[-1] if memory else 'nothing'}."))
        return found

    monkeypatch.setattr(context, "replies", replies)
    claim = context.run(work)
    assert claim.best_prompt and claim.best_prompt.of == context.TEST
    # The prompt that always follows is the best, and steering cannot follow more.
    assert claim.best_prompt.value == claim.ours.value == 1.0 and not claim.holds  # type: ignore[union-attr]
    tried, shown = claim.tables[1], claim.tables[0]
    assert "chat, opinion" in str(shown.rows) and len(tried.rows) >= 8
    assert any("strength" in str(row[0]) for row in tried.rows)
    steered = {prompt for prompt, strength in asked if strength}
    assert steered, "no prompt was steered"
    assert "| " in page.part([claim]) and len(claim.examples) == context.EXAMPLES


def test_the_claim_on_instructions_holds_if_steering_obeys(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain model never obeys, the steered one always."""
    asked = {
        f"{order.task} {order.instruction}": order
        for split in ("second validation 0", "second test 0")
        for order in orders(instructions.TEST, split)
    }
    obeys: dict[str, str] = {kind: reply for kind, (_, reply) in SHOTS.items()}

    def replies(_url: str, _path: str, bodies: list[dict[str, Any]]) -> list[Reply]:
        found = []
        for body in bodies:
            text = body["messages"][-1]["content"].partition("\n\n")[0]
            order = asked[text]
            reply = obeys[order.kind].replace("Bees", order.topic) if "steering" in body else "No."
            found.append(_reply(reply))
        return found

    monkeypatch.setattr(instructions, "replies", replies)
    monkeypatch.setattr(instructions, "log_probs", lambda *_: [[-1.0, -2.0]])
    monkeypatch.setattr("smollm.evidence.orders.Order.obeyed", lambda _o, text, _e: text != "No.")
    claim = instructions.run(work)
    assert claim.holds and claim.ours and claim.best_prompt
    assert (claim.ours.value, claim.best_prompt.value) == (1.0, 0.0)
    assert [row[0] for row in claim.tables[1].rows] == list(KINDS)
    assert "γ" in str(claim.tables[0].rows) and "| yes |" in page.part([claim])
