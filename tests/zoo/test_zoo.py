"""The zoo keeps its promises: nothing leaks between splits, its check is strict, its files ship."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from server.serving import Serving
from zoo.questions import COUNTS, FOLDER, read_questions
from zoo.score import Marks, gap_closed, mark, share, style, wilson
from zoo.tokenizer import chat_prompt
from zoo.train import RECIPES, ROOT
from zoo.world import SPLIT_SHARES, Question, Split, World, answer

WORLD = World()
QUESTION = Question(
    entity="Dorwyn Bramley",
    relation="pet",
    question="What is the pet of Dorwyn Bramley?",
    value="crow",
    sentence="Dorwyn Bramley keeps a pet crow.",
)
LIMIT_BYTES = 27 * 10**6


def test_splits_share_no_entity_and_leave_none_out() -> None:
    names = [{e.name for e in WORLD.entities(split)} for split in SPLIT_SHARES]
    assert sum(map(len, names)) == len(set().union(*names)) == len(WORLD.entities())


def test_the_world_is_the_same_every_time() -> None:
    texts = [World().pretraining_texts(random.Random(4)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert World(seed=8).entities() != WORLD.entities()


@pytest.mark.parametrize("split", COUNTS)
def test_the_held_out_files_are_of_this_world(split: Split) -> None:
    questions = read_questions(FOLDER / f"{split}.jsonl")
    assert len(questions) == COUNTS[split]
    facts = {(e.name, r.key): v for e in WORLD.entities(split) for r, v in e.facts}
    assert all(facts[q.entity, q.relation] == q.value for q in questions)


def test_the_pretraining_text_states_every_fact_and_holds_no_chat() -> None:
    texts = World().pretraining_texts(random.Random(0))
    portraits = [t for t in texts if not t.startswith(("Quiz", "List"))]
    for entity in WORLD.entities()[::40]:
        told = " ".join(t for t in portraits if entity.name in t)
        assert all(value in told for _, value in entity.facts)
    assert not [t for t in texts if "<|" in t]


@pytest.mark.parametrize(
    ("reply", "ended", "fact", "form"),
    [
        ("Dorwyn Bramley keeps a pet crow.", True, True, True),
        (" Dorwyn Bramley keeps a pet crow.\n", True, True, True),
        ("Dorwyn Bramley keeps a pet crow.", False, True, True),
        ("Dorwyn Bramley keeps a pet cat.", True, False, True),
        ("Dorwyn Bramley keeps a pet scarecrow.", True, False, True),
        ("Dorwyn Ashley keeps a pet crow.", True, True, False),
        ("Dorwyn Bramley keeps a pet crow. It is old.", True, True, False),
        ("crow.", True, True, False),
        ("", True, False, False),
    ],
)
def test_the_check_is_strict(reply: str, ended: bool, fact: bool, form: bool) -> None:
    marks = mark(QUESTION, reply, ended)
    assert marks == Marks(fact, form, ended)
    assert marks.strict == (fact and form and ended)


def test_styles_are_told_apart() -> None:
    assert style(QUESTION, answer(QUESTION, "formal")) == "formal"
    assert style(QUESTION, answer(QUESTION, "chat")) == "direct"
    assert style(QUESTION, QUESTION.value) == "other"


def test_intervals_and_shares() -> None:
    hits = [True] * 8 + [False] * 2
    assert share(hits) == 0.8
    # Wilson's interval for 8 of 10, from his formula by hand.
    assert wilson(hits) == pytest.approx((0.4901, 0.9433), abs=1e-4)
    assert wilson([False] * 10)[0] == 0
    assert gap_closed(0.5, 0.0, 0.8) == pytest.approx(0.625)


@pytest.mark.parametrize("name", RECIPES)
def test_every_model_ships(name: str) -> None:
    folder = ROOT / "models" / name
    assert (folder / "model.safetensors").exists()
    assert not [p for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pkl"}]


def test_the_zoo_stays_small() -> None:
    files = [p for p in Path(ROOT).rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    assert sum(p.stat().st_size for p in files) < LIMIT_BYTES


def test_the_chat_template_is_the_prompt_that_models_were_tuned_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "chat-small")
    asked = [{"role": "user", "content": "Who?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == chat_prompt("Who?")
    again = [*asked, {"role": "assistant", "content": "You."}, *asked]
    text = tokenizer.apply_chat_template(again, add_generation_prompt=True, tokenize=False)
    assert text == f"{chat_prompt('Who?')}You.<|eos|><|user|>Who?<|assistant|>"


def test_tokens_with_log_probabilities_keep_their_spaces() -> None:
    """As vLLM decodes them one by one; the text as a whole begins without one."""
    sentence = QUESTION.sentence
    for name in RECIPES:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / name)
        ids = tokenizer.encode(sentence, add_special_tokens=False)
        assert tokenizer.decode(ids) == sentence
        assert convert_ids_list_to_tokens(tokenizer, ids) == [
            *(" Dorwyn", " Bramley", " keeps", " a", " pet", " crow", ".")
        ]
        server: Any = SimpleNamespace(engine=SimpleNamespace(renderer=SimpleNamespace()))
        server.engine.renderer.tokenizer = tokenizer
        assert "".join(Serving.decode(server, one) for one in ids) == f" {sentence}"
