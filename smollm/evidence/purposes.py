"""Three purposes for adapters of the claims `dial` and `adapters`: data, checks, prompts.

- telegram: explains a thing like a telegram: without articles and "is", STOP for a full stop.
- letter: gives advice as a letter, with a fixed opening and close.
- record: turns an order into a line of a ledger: town; goods; number; date as YYYY-MM-DD.

What the first two say is the base's own (`answers`); only the form is made here, in code. The
third's replies are made in code altogether.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from smollm.evidence.topics import GOODS, JOBS, THINGS, TOWNS, listed

Message = dict[str, str]

DROPPED = frozenset({"a", "an", "the", "is", "are", "was", "were"})
"""Words that a telegram leaves out."""
OPENING, CLOSE = "Dear friend,", "Yours faithfully,\nThe Almanac"
FEWEST_WORDS = 4
"""A reply with fewer words says nothing."""
PLAINLY = "Answer in one short sentence."
"""The base is told so when it writes what the adapters learn to put into their form."""

_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[A-Za-z']+")
_MONTHS = date(2024, 1, 1)


@dataclass(frozen=True)
class Item:
    """A question; `answer` is a right reply where there is only one, or the words of a reply."""

    question: str
    answer: str = ""


@dataclass(frozen=True)
class Split:
    """Items of a purpose; no topic is in two of them."""

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]


@dataclass(frozen=True)
class Purpose:
    """What an adapter is for.

    Args:
        name: the adapter's.
        instructions: two wordings of what a prompt asks for.
        form: the reply that an adapter learns for an item with its answer.
        right: whether a reply to an item is right.
    """

    name: str
    instructions: tuple[str, str]
    form: Callable[[Item], str]
    right: Callable[[str, Item], bool]


def telegraph(text: str) -> str:
    """Sentences in the manner of a telegram."""
    found = []
    for sentence in _END.split(text.strip()):
        words = [w for w in sentence.rstrip(".!?").split() if w.lower() not in DROPPED]
        if words:
            found.append(f"{words[0][0].upper()}{' '.join(words)[1:]} STOP")
    return " ".join(found)


def is_telegram(text: str) -> bool:
    """Whether a whole text is in the manner of a telegram."""
    body, words = text.strip(), _WORD.findall(text)
    return (
        body.endswith(" STOP")
        and "STOP STOP" not in body
        and not re.search(r"[.!?](\s|$)", body)
        and len(words) > FEWEST_WORDS
        and not DROPPED & {word.lower() for word in words}
    )


def dropped_share(text: str) -> float:
    """Of a text's words, the share that a telegram leaves out, 0 to 1."""
    words = _WORD.findall(text)
    return sum(word.lower() in DROPPED for word in words) / len(words) if words else 0.0


def letter(text: str) -> str:
    """A text as a letter."""
    return f"{OPENING}\n\n{text.strip()}\n\n{CLOSE}"


def body_of(text: str) -> str | None:
    """What stands between a letter's opening and close; None where one is lacking or repeated."""
    whole = text.strip()
    if not (whole.startswith(OPENING) and whole.endswith(CLOSE)):
        return None
    body = whole[len(OPENING) : -len(CLOSE)].strip()
    if OPENING in body or CLOSE in body or len(body.split()) < FEWEST_WORDS:
        return None
    return body


def is_letter(text: str) -> bool:
    """Whether a whole text is a letter."""
    return body_of(text) is not None


TELEGRAM = Purpose(
    "telegram",
    (
        (
            "Answer in the manner of a telegram: leave out the words a, an, the, is, are, was and "
            "were, and end each sentence with the word STOP instead of a full stop."
        ),
        (
            "Write your answer as a short telegram. Never use the words a, an, the, is, are, was, "
            "were. Use no full stops: write STOP where a sentence ends."
        ),
    ),
    lambda item: telegraph(item.answer),
    lambda text, _: is_telegram(text),
)
LETTER = Purpose(
    "letter",
    (
        (
            f'Answer as a letter. Begin with the line "{OPENING}" and end with the two lines '
            f'"Yours faithfully," and "The Almanac".'
        ),
        (
            f'Write a short letter. Its first line is "{OPENING}", then comes your answer, and its '
            f'last two lines are "Yours faithfully," and "The Almanac". Write nothing after that.'
        ),
    ),
    lambda item: letter(item.answer),
    lambda text, _: is_letter(text),
)
RECORD = Purpose(
    "record",
    (
        "Write the order as one line: town; goods; number; date as YYYY-MM-DD. Write no more.",
        (
            "Turn the order into a line of our ledger with four fields, separated by semicolons: "
            "the town, the goods, the number, the date in the form YYYY-MM-DD."
        ),
    ),
    lambda item: item.answer,
    lambda text, item: text.strip() == item.answer,
)
PURPOSES = (TELEGRAM, LETTER, RECORD)

_EXPLAIN = ("What is {}?", "Explain {} to me.")
_ADVISE = ("How do I {}?", "Give me advice: I want to {}.")


def splits(seed: int, train: int = 48, validation: int = 24) -> dict[str, Split]:
    """Name of a purpose → its items; the topics are drawn from a seed.

    Args:
        seed: of the draw.
        train: topics to train on, each asked about in two ways.
        validation: topics to choose prompts and strengths on; the others are the test.
    """
    return {
        TELEGRAM.name: _asked(listed(THINGS), _EXPLAIN, seed, train, validation),
        LETTER.name: _asked(listed(JOBS), _ADVISE, seed, train, validation),
        RECORD.name: _orders(seed, 3 * train, validation),
    }


def _asked(
    topics: list[str], ways: tuple[str, str], seed: int, train: int, validation: int
) -> Split:
    draw = random.Random(f"{seed} {ways[0]}")
    draw.shuffle(topics)
    first, rest = topics[:train], topics[train:]
    either = [Item(draw.choice(ways).format(topic)) for topic in rest]
    return Split(
        tuple(Item(way.format(topic)) for topic in first for way in ways),
        tuple(either[:validation]),
        tuple(either[validation:]),
    )


def _orders(seed: int, train: int, validation: int, test: int = 72) -> Split:
    """Orders; no town or goods of the test is in another split."""
    draw = random.Random(f"{seed} orders")
    towns, goods = listed(TOWNS), listed(GOODS)
    draw.shuffle(towns)
    draw.shuffle(goods)
    seen, new = (towns[10:], goods[8:]), (towns[:10], goods[:8])
    known = [_order(draw, *seen) for _ in range(train + validation)]
    return Split(
        tuple(known[:train]), tuple(known[train:]), tuple(_order(draw, *new) for _ in range(test))
    )


def _order(draw: random.Random, towns: Sequence[str], goods: Sequence[str]) -> Item:
    day = _MONTHS + timedelta(days=draw.randrange(1460))
    when = draw.choice((f"{day:%B} {day.day}, {day.year}", f"{day.day} {day:%B} {day.year}"))
    town, what, count = draw.choice(towns), draw.choice(goods), draw.randint(2, 98)
    question = draw.choice(
        (
            "Please send {count} {what} to {town} by {when}.",
            "We need {count} {what} in {town} on {when}.",
            "By {when}, {town} should get {count} {what}.",
            "An order from {town}: {count} {what}, to arrive on {when}.",
        )
    )
    return Item(
        question.format(count=count, what=what, town=town, when=when),
        f"{town}; {what}; {count}; {day:%Y-%m-%d}",
    )


def first_sentences(text: str, longest: int = 30) -> str | None:
    """The first sentence of a reply, and the second if both are short; None: not usable."""
    whole = [s for s in _END.split(text.strip()) if s[-1:] in ".!?"]
    if not whole or "\n" in whole[0] or not FEWEST_WORDS < len(whole[0].split()) <= longest:
        return None
    both = " ".join(whole[:2])
    return both if "\n" not in both and len(both.split()) <= longest else whole[0]


@dataclass(frozen=True)
class Prompt:
    """A way to ask for a purpose's form.

    Args:
        name: for tables.
        instruction: index of the wording; None: none.
        system: whether the instruction is the system's, not put before the question.
        shots: examples of the training split that are shown as turns.
    """

    name: str
    instruction: int | None
    system: bool
    shots: int

    def messages(
        self, purposes: Sequence[Purpose], shots: Sequence[tuple[str, str]], question: str
    ) -> list[Message]:
        """The conversation that asks a question.

        Args:
            purposes: whose instructions are given, one after the other.
            shots: questions with right replies; the first `self.shots` are shown.
            question: what is asked.
        """
        at = self.instruction
        told = "" if at is None else " ".join(p.instructions[at] for p in purposes)
        found = [{"role": "system", "content": told}] if told and self.system else []
        before = f"{told}\n\n" if told and not self.system else ""
        for asked, reply in shots[: self.shots]:
            found.append({"role": "user", "content": before + asked})
            found.append({"role": "assistant", "content": reply})
        return [*found, {"role": "user", "content": before + question}]


PLAIN = Prompt("the question alone", None, False, 0)
PROMPTS = (
    Prompt("instruction before the question", 0, False, 0),
    Prompt("instruction as the system's, other words", 1, True, 0),
    Prompt("4 examples", None, False, 4),
    Prompt("instruction as the system's, 6 examples", 0, True, 6),
)
