"""The questions and checks of the claims on texts and instructions; no model."""

from __future__ import annotations

import random
import re

import pytest

from smollm.evidence import context, instructions
from smollm.evidence.facts import KINDS as FACTS
from smollm.evidence.facts import Fact, facts, text
from smollm.evidence.orders import KINDS, SHOTS, Order, orders, stem

FRANCE = Fact("capital", "France", "Paris")


def test_a_text_says_what_its_case_says() -> None:
    for case in context.CASES:
        for item in context.items(facts(), case, 0):
            assert item.said in item.context and "{" not in item.context
            if case == context.AGREES:
                assert item.said == item.right == item.fact.value
            else:
                assert item.said != item.fact.value
                assert item.right == (item.said if case == context.CONFLICT else item.fact.value)
            about = re.search(rf"\b{re.escape(item.fact.subject)}\b", item.context, re.IGNORECASE)
            assert bool(about) == (case != context.BESIDE), item


def test_every_kind_of_fact_has_a_text_that_can_agree() -> None:
    for kind, spec in FACTS.items():
        assert any("{o}" not in form for form in spec.texts), kind
    made = {text(FRANCE, "Paris", random.Random(i)) for i in range(20)}
    assert not [one for one in made if "decided to leave Paris" in one]


def test_the_facts_of_few_shot_prompts_are_not_asked() -> None:
    assert not {(f.kind, f.subject) for f in context.SHOTS} & {(f.kind, f.subject) for f in facts()}


@pytest.mark.parametrize(
    ("reply", "first"),
    [
        (" Lyon, which replaced Paris.", "Lyon"),
        (" Paris, not Lyon", "Paris"),
        (" parisian", None),
        (" LYON", "Lyon"),
        (" 42", None),
    ],
)
def test_a_reply_counts_by_the_value_that_it_names_first(reply: str, first: str | None) -> None:
    item = context.Item(FRANCE, context.CONFLICT, "", "Lyon")
    assert context.named(item, reply) == first


def test_names_and_symbols_are_read_as_such() -> None:
    assert context.first_named("by Tolstoy", ["Leo Tolstoy", "Homer"]) == "Leo Tolstoy"
    assert context.first_named(" cu", ["Cu"]) is None
    assert context.first_named(" Oklahoma City", ["Salt Lake City"]) is None


def test_the_second_stream_does_not_read_the_text() -> None:
    (item,) = context.items([FRANCE], context.CONFLICT, 0)
    for form in context.formats(str):
        assert item.context in form.with_text(item), form.name
        assert item.said not in form.without(item), form.name
        assert form.with_text(item).endswith(form.without(item)[-10:]), form.name


OWN = {
    "required word": lambda reply: "summer" in reply,
    "forbidden word": lambda reply: "they" not in reply.lower(),
    "at most so many words": lambda reply: len(reply.split()) <= 8,
    "begins with": lambda reply: reply.startswith("Good news:"),
    "ends with": lambda reply: reply.endswith("I am done."),
}
"""Kinds whose example for few-shot prompts has a word or number that is never asked."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_a_few_shot_prompt_obeys(kind: str) -> None:
    asked, reply = SHOTS[kind]
    drawn = dict(KINDS[kind](random.Random(seed)) for seed in range(50))
    checks = [check for instruction, check in drawn.items() if asked.endswith(instruction)]
    assert bool(checks) != (kind in OWN)
    (check,) = checks or [OWN[kind]]
    assert check(reply)


@pytest.mark.parametrize(
    ("kind", "obeys", "does_not"),
    [
        ("lower case", "only small letters.", "Not only."),
        ("upper case", "LOUD.", "Loud."),
        ("at most so many words", "Three short words.", "word " * 21),
        ("one sentence", "One only.", "One. Two."),
        ("quotes", '"All of it."', 'Not "all".'),
        ("title", "<<A>>\nText", "A title"),
        ("no commas", "one two three four five", "one, two three four five"),
        ("JSON", '{"text": "a"}', "text: a"),
        ("question", "Is it? Why?", "It is. Why?"),
    ],
)
def test_a_check_tells_them_apart(kind: str, obeys: str, does_not: str) -> None:
    _, check = KINDS[kind](random.Random(1))
    assert check(obeys) and not check(does_not)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("French", "Le chat est dans la maison et il dort."),
        ("German", "Die Katze ist in dem Haus und es ist warm."),
        ("Spanish", "El gato es muy grande y la casa es de su amo."),
    ],
)
def test_a_language_is_known_by_its_frequent_words(name: str, said: str) -> None:
    for seed in range(20):
        instruction, check = KINDS["language"](random.Random(seed))
        assert check(said) == (name in instruction)
        assert not check("The cat is in the house and it is a big one.")


def test_a_reply_that_was_cut_off_is_not_a_list_of_three() -> None:
    order = Order("bullet points", "t", "tea", "i", lambda _: True)
    assert order.obeyed("- tea", True) and not order.obeyed("- tea", False)
    assert Order("lower case", "t", "tea", "i", lambda _: True).obeyed("tea", False)


def test_a_reply_must_be_about_its_topic_and_its_own() -> None:
    order = Order("upper case", "Describe old books briefly.", "old books", "i", str.isupper)
    assert order.obeyed("A BOOK IS OLD.", True)
    assert not order.obeyed("A HORSE IS OLD.", True)
    for kind, (_, reply) in SHOTS.items():
        assert not Order(kind, "t", "bees", "i", lambda _: True).obeyed(reply, True)
    assert Order("language", "t", "tea", "i", lambda _: True).obeyed("Le thé.", True)


@pytest.mark.parametrize(
    ("topic", "shared"),
    [("the moon", "moon"), ("libraries", "librar"), ("dancing", "danc"), ("tea", "tea"),
     ("paintings", "painting"), ("old books", "book"), ("chess", "ches")],
)  # fmt: skip
def test_a_topic_is_named_in_any_form(topic: str, shared: str) -> None:
    assert stem(topic) == shared


def test_the_splits_ask_different_things() -> None:
    first, second = ({(o.task, o.instruction) for o in orders(96, s)} for s in ("a", "b"))
    assert len(first & second) < 10
    assert [o.kind for o in orders(16, "a")] == list(KINDS)


def test_every_format_holds_the_instruction_and_the_other_stream_does_not() -> None:
    for order in orders(len(KINDS), "a"):
        for form in instructions.FORMATS:
            asked = instructions.body(order, instructions.Setting(form, 2.0))
            assert order.instruction in asked["messages"][-1]["content"]
            (other,) = asked["steering"]["prompts"].values()
            said = [one["content"] for one in other["messages"] if one["role"] == "user"]
            assert all(one in ("Tell me about bees.", order.task) for one in said)
