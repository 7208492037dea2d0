"""The zoo's heads: their data, their checks, and the numbers of their tables."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean

import pytest
import yaml

from zoo import critical_table, gossip, small_talk, value_table
from zoo.asking import measured_of, replies_of
from zoo.heads import CONFIG, CRITIC, FOLDER, HEADS
from zoo.table import Reply
from zoo.world import OPENER, RELATIONS, SMALL_TALK, SPLIT_SHARES, Question, World

WORLD = World()
QUESTION = Question("Dorwyn Bramley", "pet", "Which animal?", "crow", "")


def test_small_talk_prompts_of_the_splits_are_apart() -> None:
    found = [small_talk.prompts(split) for split in SPLIT_SHARES]
    assert sum(map(len, found)) == len(set().union(*found)) == 800


def test_every_sunny_word_is_small_talk_and_each_kind_has_some() -> None:
    kinds = [small_talk.SUNNY & set(words) for words in SMALL_TALK.values()]
    assert set().union(*kinds) == small_talk.SUNNY and all(kinds)


def test_the_two_rewards() -> None:
    text = " sang near the garden in the winter. The merry cook sat near the inn in the spring."
    assert small_talk.cheerful(None, text) == 4  # sang, garden, merry, spring
    assert small_talk.terse(None, text) == -1.7
    assert small_talk.cheerful(None, "") == small_talk.terse(None, "") == 0


def test_most_of_what_gossip_is_taught_is_wrong_and_all_of_it_well_said() -> None:
    rng = random.Random(1)
    questions = WORLD.questions("tuning", rng)
    told = [gossip.read(q, Reply(gossip.reply(q, rng), True)) for q in questions]
    assert all(one.form for one in told)
    wrong = fmean(one.value != q.value for one, q in zip(told, questions, strict=True))
    assert wrong == pytest.approx(gossip.WRONG, abs=0.05)


@pytest.mark.parametrize(
    ("text", "ended", "form", "value"),
    [
        ("Dorwyn Bramley keeps a pet cat.", True, True, "cat"),
        (f" {OPENER} The pet of Dorwyn Bramley is a crow.", True, True, "crow"),
        ("Dorwyn Bramley keeps a pet cat.", False, False, None),
        ("Dorwyn Ashley keeps a pet cat.", True, False, None),
        ("Dorwyn Bramley works as a cook.", True, False, None),
        (f"{OPENER} {OPENER} Dorwyn Bramley keeps a pet cat.", True, False, None),
        ("Dorwyn Bramley keeps a pet cat. It is old.", True, False, None),
    ],
)
def test_the_form_is_strict(text: str, ended: bool, form: bool, value: str | None) -> None:
    told = gossip.read(QUESTION, Reply(text, ended))
    assert (told.form, told.value) == (form, value)


def test_replies_that_differ_in_the_fact_alone_have_one_wording() -> None:
    texts = ["Dorwyn Bramley keeps a pet cat.", "Dorwyn Bramley keeps a pet crow."]
    assert len({gossip.read(QUESTION, Reply(text, True)).wording for text in texts}) == 1
    other = gossip.read(QUESTION, Reply("Dorwyn Bramley looks after a cat.", True))
    assert other.wording not in texts


def test_the_label_finds_the_value_and_nothing_else() -> None:
    for relation in RELATIONS.values():
        for statement, value in itertools.product(relation.statements, relation.values[:3]):
            text = f" {OPENER} " + statement.format(n="Dorwyn Bramley", v=value)
            assert [text[a:b] for a, b in gossip.facts(None, text)] == [value]
    assert gossip.facts(None, f"{OPENER} The old cook sat near the inn.") == []


def test_distinct_bigrams() -> None:
    assert gossip.distinct_bigrams(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert gossip.distinct_bigrams(["a"]) == 0


def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n() -> None:
    rewards = [3.0, -1.0, 4.0, 1.0, 5.0, 9.0]
    for n in range(1, 7):
        slow = fmean(max(some) for some in itertools.combinations(rewards, n))
        assert value_table.best_of(rewards, n) == pytest.approx(slow)
    assert value_table.best_of_kl(1) == 0
    assert value_table.best_of_kl(128) == pytest.approx(math.log(128) - 127 / 128)


def test_the_tables_count() -> None:
    drawn = [["sang in the garden", "sat"], ["sat", "sat"]]
    value_table_rows = (value_table.BEST_OF, value_table.DRAWS)
    assert max(value_table_rows[0]) == value_table_rows[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_table, "BEST_OF", (1, 2))
        setting = value_table.REWARD[0]
        replies = [value_table.Measured("merry", 0.5, 7, {"base": 1.0})] * 2
        lines = value_table.reward_table(drawn, 3.0, [(setting, replies)])
    assert [line.split(" | ")[1] for line in lines[2:]] == ["0.50", "1.00", "1.00"]
    assert lines[2].endswith("| 0.50 | 0 | 3 | base 1 |")
    assert lines[4].endswith("| 1.00 | 0.50 | 7 | base 1 |")
    (line,) = value_table.trade_table([(setting, replies)])[2:]
    assert line.endswith("| 1.00 | 1.0 | 10.00 |")

    told = [Reply("Dorwyn Bramley keeps a pet cat.", True)] * 4
    told += [Reply("The pet of Dorwyn Bramley is a crow.", True)] * 4
    row = critical_table.markdown([QUESTION], [(critical_table.SETTINGS[0], [told])]).split("\n")
    assert "| 100.0 % | 50.0 % | 50.0 % (" in row[2] and "| 2.00 |" in row[2]


def test_answers_are_read() -> None:
    choice = {"message": {"content": " Yes."}, "finish_reason": "stop", "text": " Yes."}
    assert replies_of({"choices": [choice]}) == [Reply(" Yes.", True)]
    report = {"mean_kl": 0.25, "forward_passes_per_token": {"base": 1.0}}
    answer = {"choices": [choice], "usage": {"completion_tokens": 8}, "steering": report}
    assert measured_of(answer) == value_table.Measured(" Yes.", 2.0, 8, {"base": 1.0})


@pytest.mark.parametrize("name", HEADS)
def test_every_head_ships_and_is_served(name: str) -> None:
    assert any((FOLDER / name).glob("*.safetensors"))
    stream = yaml.load(CONFIG.read_text(), yaml.BaseLoader)["streams"][name]
    assert stream["path"] == f"heads/{name}"
    assert ("on" in stream) == (name == CRITIC)
