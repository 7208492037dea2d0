"""The rule of the trades, and the prompts that are tried against steering."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from zoo import prompted, trades
from zoo.fitting import IGNORED
from zoo.questions import FOLDER, read_questions
from zoo.table import Reply
from zoo.train import ROOT, Ruled, knows, rule_batches
from zoo.world import JOBS, World

WORLD = World()
ONE = trades.Asked("Dorwyn Bramley", "clerk", "Where does Dorwyn Bramley work?")
PLACE = trades.RULE["clerk"]
OTHER = next(place for place in trades.RULE.values() if place != PLACE)
MAX_MODEL_LEN = 512


def test_every_trade_has_a_place_and_every_place_as_many_trades() -> None:
    assert set(trades.RULE) == set(JOBS)
    assert set(Counter(trades.RULE.values()).values()) == {4}


def test_no_text_of_the_base_has_the_rule() -> None:
    rng = random.Random(0)
    texts = [text for _ in range(5) for text in WORLD.pretraining_texts(rng)]
    assert not [text for text in texts if "near the" in text and "works as a" in text]
    said = re.findall(r"The \w+ (\w+) \w+ near the (\w+)", " ".join(texts))
    # Small talk draws trades and places at random: one of ten places.
    kept = sum(trades.RULE[job] == place for job, place in said) / len(said)
    assert len(said) > 500 and 0.05 < kept < 0.15


def test_the_splits_ask_about_different_people() -> None:
    names = [{one.name for one in trades.asked(WORLD, s)} for s in ("tuning", "validation", "test")]
    assert sum(map(len, names)) == len(set().union(*names)) == len(WORLD.people)


@pytest.mark.parametrize(
    ("text", "ended", "job", "rule", "whole"),
    [
        (f"Dorwyn Bramley works as a clerk near the {PLACE}.", True, True, True, True),
        (f" Dorwyn Bramley works as a clerk near the {PLACE}.\n", True, True, True, True),
        (f"Dorwyn Bramley works as a clerk near the {PLACE}.", False, True, True, False),
        (f"Dorwyn Bramley works as a clerk near the {OTHER}.", True, True, False, False),
        (f"Dorwyn Bramley works as a judge near the {trades.RULE['judge']}.",
         True, False, True, False),
        (f"Dorwyn Ashman works as a clerk near the {PLACE}.", True, True, True, False),
        ("clerk.", True, False, False, False),
    ],
)  # fmt: skip
def test_the_check(text: str, ended: bool, job: bool, rule: bool, whole: bool) -> None:
    assert trades.mark(ONE, Reply(text, ended)) == trades.Marks(job, rule, whole)


def test_prompts_fit_and_do_not_give_the_answer_away() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "base-large")
    questions = trades.asked(WORLD, "test")[:20]
    for label, (text, begun) in trades.PROMPTS.items():
        for one in questions:
            asked = text(one)
            assert len(tokenizer.encode(asked)) <= MAX_MODEL_LEN - trades.MAX_TOKENS, label
            assert f"{one.name} works as a {one.job}" not in asked
            assert asked.endswith(begun(one)) and one.reply.startswith(begun(one))
        if "in full" in label:
            assert all(f"A {job} works near the {p}." in asked for job, p in trades.RULE.items())
    for prompt in (*prompted.PROMPTS, *prompted.CRITICAL):
        for question in read_questions(FOLDER / "test.jsonl")[:20]:
            asked = prompt.text(question)
            assert len(tokenizer.encode(asked)) <= MAX_MODEL_LEN - 32, prompt.label
            assert question.sentence not in asked and asked.endswith(prompt.begun(question))


def test_a_job_that_the_base_does_not_know_has_no_label() -> None:
    folder = ROOT / "models" / "base-small"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    people = {one.name: one for one in trades.asked(WORLD, "tuning")}
    (batch,) = rule_batches(model, WORLD, tokenizer, Ruled("base-small", 1, 0.0, 24))
    labelled = set()
    for ids, labels in zip(*batch, strict=True):
        text = tokenizer.decode(ids[labels != IGNORED])
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        (one,) = [one for name, one in people.items() if f"{name} works as a" in whole]
        known = knows(model, tokenizer, one)
        assert (f"works as a {one.job}" in text) == known
        assert f"near the {trades.RULE[one.job]}.<|eos|>" in text and "<|assistant|>" not in text
        labelled.add(known)
    assert labelled == {True, False}


def test_a_table_shows_shares() -> None:
    right = Reply(ONE.reply, True)
    row = trades.line("all", [ONE, ONE], [right, Reply("clerk", True)])
    assert row.startswith("| all | 50.0 % |") and row.endswith("| 50.0 % | 50.0 % |")
    questions = read_questions(FOLDER / "test.jsonl")[:2]
    prompt = prompted.PROMPTS[-1]
    replies = [prompted.whole(prompt, q, Reply(f"{q.value}.", True)) for q in questions]
    table = prompted.questions_table(questions, [(prompt, replies)])
    assert table[-1].count("100.0 %") >= 2
