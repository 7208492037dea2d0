"""The data, checks, prompts and training of the claims on adapters; a tiny model, no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from smollm.evidence import dial, trained
from smollm.evidence.asking import Reply
from smollm.evidence.exact import error, peft_model, routed_model
from smollm.evidence.prompting import Wanted
from smollm.evidence.purposes import (
    LETTER,
    PROMPTS,
    RECORD,
    TELEGRAM,
    Item,
    dropped_share,
    first_sentences,
    is_letter,
    is_telegram,
    letter,
    splits,
    telegraph,
)
from smollm.evidence.topics import JOBS, THINGS, listed
from tests.adapters.make import make_lora, make_native
from tests.adapters.models import Applied, adapted
from tests.models import make_model

SAID = "A dam is a wall that holds back a river. The water behind it is a lake."


def test_a_text_in_its_form_is_right_and_the_text_itself_is_not() -> None:
    sent = telegraph(SAID)
    assert sent == "Dam wall that holds back river STOP Water behind it lake STOP"
    assert is_telegram(sent) and not is_telegram(SAID)
    assert is_letter(letter(SAID)) and not is_letter(SAID)
    assert dial.is_both(letter(sent))
    assert not dial.is_both(letter(SAID)) and not dial.is_both(sent)
    assert dropped_share(sent) == 0 and dropped_share("The dam is old") == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "STOP",
        "Wall holds back river",
        "Wall holds back the river STOP",
        "Wall holds back river. It keeps water STOP",
        "Wall holds back river STOP STOP",
        "Wall holds back river STOP And",
    ],
)
def test_what_is_no_telegram(text: str) -> None:
    assert not is_telegram(text)


@pytest.mark.parametrize(
    "text",
    [letter(""), letter("Wait."), letter(letter(SAID)), letter(SAID)[:-3], "So: " + letter(SAID)],
)
def test_what_is_no_letter(text: str) -> None:
    assert not is_letter(text)


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (SAID, SAID),
        (f"{SAID} It", SAID),
        ("A dam is a wall that holds", None),
        ("Wait.", None),
        ("Here is a list:\n1. A dam is a wall that holds back a river.", None),
        (f"A dam is a wall. {'It is very old ' * 8}indeed.", "A dam is a wall."),
        (f"A dam is a wall {'that is old ' * 10}indeed.", None),
    ],
)
def test_of_a_reply_whole_short_sentences_are_kept(reply: str, kept: str | None) -> None:
    assert first_sentences(reply) == kept


def test_no_topic_is_in_two_splits_and_a_seed_decides_them() -> None:
    found = splits(3)
    assert found == splits(3) != splits(4)
    for name, topics in ((TELEGRAM.name, THINGS), (LETTER.name, JOBS)):
        names = listed(topics)
        assert len(set(names)) == len(names)
        split = found[name]
        used = [
            {topic for topic in names for item in part if _asks(item.question, topic)}
            for part in (split.train, split.validation, split.test)
        ]
        assert [len(some) for some in used] == [48, 24, len(names) - 72]
        assert len(set.union(*used)) == len(names)
    test = {item.answer.split("; ")[i] for item in found[RECORD.name].test for i in (0, 1)}
    others = found[RECORD.name].train + found[RECORD.name].validation
    assert not test & {item.answer.split("; ")[i] for item in others for i in (0, 1)}


def _asks(question: str, topic: str) -> bool:
    return question.removesuffix(" to me.").rstrip(".?").endswith(f" {topic}")


def test_an_order_has_one_right_line() -> None:
    for item in splits(0)[RECORD.name].test:
        town, goods, count, day = item.answer.split("; ")
        assert all(part in item.question for part in (town, goods, count))
        assert str(int(day[-2:])) in item.question and day[:4] in item.question
        assert RECORD.right(f" {item.answer}\n", item)
        assert not RECORD.right(f"{item.answer}.", item)


def test_prompts_show_instructions_and_right_examples() -> None:
    train = [Item(f"What is {i}?", f"{SAID} {i} it is.") for i in range(60)]
    wanted = Wanted.of(TELEGRAM, train)
    assert all(is_telegram(reply) for _, reply in wanted.shots)
    assert len({prompt.name for prompt in PROMPTS}) == len(PROMPTS) >= 4
    for prompt in PROMPTS:
        messages = prompt.messages(wanted.purposes, wanted.shots, "And this?")
        text = json.dumps(messages)
        assert sum(m["role"] == "assistant" for m in messages) == prompt.shots
        assert messages[-1]["content"].endswith("And this?")
        told = prompt.instruction is not None
        assert (TELEGRAM.instructions[prompt.instruction or 0] in text) == told
    right = Reply(telegraph(SAID), True, (), 0.0, {})
    wrong = Reply(SAID, True, (), 0.0, {})
    assert wanted.share([right, wrong], train[:2]).value == 0.5


def test_a_lora_learns_and_is_kept(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = make_model(tmp_path / "base", "llama")
    items = [Item("Who rows?", f"We row boat number {i} now.") for i in range(4)]
    lines = trained.example_lines(TELEGRAM, items)
    out = tmp_path / "telegram"
    trained.train_lora(base, lines, out, epochs=10, first_layer=1)
    weights = (out / "adapter_model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = trained.encoded(base, lines)
    before = trained.reply_loss(model, rows).item()
    tuned = PeftModel.from_pretrained(model, str(out))
    assert trained.reply_loss(model, rows).item() < before - 0.1
    assert all(".layers.0." not in name for name in tuned.state_dict() if "lora_" in name)
    trained.train_lora(base, lines, out, epochs=1, first_layer=1)
    assert (out / "adapter_model.safetensors").read_bytes() == weights


def test_the_references_of_exactness_are_those_of_the_tests(tmp_path: Path) -> None:
    """A mix is PEFT's, a pack is MeteoRA's; and an error that is there is found."""
    torch.set_num_threads(1)
    base = make_model(tmp_path / "base", "llama")
    pack = make_native(tmp_path / "pack", base, tasks=3, seed=1)
    one, two = (make_lora(tmp_path / f"l{i}", base, seed=9 + i) for i in range(2))
    ids = [5, 9, 2, 7, 4]
    for own, applied in (
        (peft_model(base, {one: 1.0}), [Applied(one)]),
        (peft_model(base, {one: 0.7, two: 0.5}), [Applied(one, 0.7), Applied(two, 0.5)]),
        (routed_model(base, pack), [Applied(pack)]),
    ):
        with torch.inference_mode():
            logits = adapted(base, tuple(applied))(input_ids=torch.tensor([ids])).logits[0]
        scores = logits.double().log_softmax(-1)
        places = [{t: float(row[t]) for t in (0, 3)} for row in scores[2:-1]]
        assert error(own, [(ids[:3], ids[3:], places)]) < 1e-4
        places[1][3] += 0.25
        assert error(own, [(ids[:3], ids[3:], places)]) == pytest.approx(0.25, abs=1e-4)
