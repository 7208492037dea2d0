"""The claim `lm_eval` without lm-eval: its questions, its score, its choice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from smollm.evidence.claim import Share
from smollm.evidence.lm_eval import CHAT, FORMATS, TASKS, Tried, read
from smollm.evidence.tasks.score import told

DOC = {"answer": "Lyon", "memory": "Paris"}


def questions(split: str) -> list[dict[str, Any]]:
    lines = (TASKS / split / "moved.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("reply", "follows", "remembers"),
    [
        (" Lyon, not Paris any more.", 1.0, 0.0),
        (" PARIS, or Lyon.", 0.0, 1.0),
        (" a city.", 0.0, 0.0),
        (None, 0.0, 0.0),
    ],
)
def test_the_first_answer_that_is_named_counts(
    reply: Any, follows: float, remembers: float
) -> None:
    assert told(DOC, [reply]) == {"follows": follows, "remembers": remembers}


def test_every_text_names_both_and_no_question_is_in_both_splits() -> None:
    splits = {name: questions(name) for name in ("validation", "test")}
    asked = {name: {one["asked"] for one in found} for name, found in splits.items()}
    assert not asked["validation"] & asked["test"]
    for one in (*splits["validation"], *splits["test"]):
        # Nothing but the reply names them: the sentence to complete does not.
        assert one["answer"] in one["context"] and one["memory"] in one["context"]
        neither = {"follows": 0.0, "remembers": 0.0}
        assert told(one, [one["asked"]]) == told(one, [one["question"]]) == neither
        assert told(one, [one["answer"]]) == {"follows": 1.0, "remembers": 0.0}
        assert told(one, [one["memory"]]) == {"follows": 0.0, "remembers": 1.0}


@pytest.mark.parametrize("task", [*FORMATS, CHAT])
def test_a_task_is_of_its_name_and_ends_with_the_question(task: str) -> None:
    found = yaml.safe_load((TASKS / f"{task}.yaml").read_text("utf-8"))
    assert found["task"] == task and found["include"] == "moved.common"
    text, _, last = found["doc_to_text"].rpartition("\n\n")
    # The twin reads the last paragraph: no text may be in it.
    assert "{{context}}" in text and "context" not in last
    assert "{{question}}" in last or "asked" in last


def test_results_are_counted() -> None:
    means = {"follows,none": 0.625, "remembers,none": 0.25}
    found = read({"results": {"moved_text": means}, "n-samples": {"moved_text": {"effective": 8}}})
    assert found == {"moved_text": {"follows": Share(5, 8), "remembers": Share(2, 8)}}


def test_the_best_on_the_validation_split_is_chosen() -> None:
    def follows(hits: int) -> dict[str, Share]:
        return {"follows": Share(hits, 40), "remembers": Share(0, 40)}

    tried = Tried(
        {"moved_text": follows(20), "moved_chat": follows(30)},
        {("moved_text", 0.5): follows(25), ("moved_told", 1.0): follows(35)},
    )
    assert (tried.prompt, tried.task, tried.strength) == ("moved_chat", "moved_told", 1.0)
