"""An invented world: entities, their facts, the phrasings that state them, and the splits.

Everything follows from the seed in :class:`World`. An entity is a person or a place with a
two-word name; each word is shared by many entities, so only the *pair* identifies one. Each
entity has three facts, and a fact's value is one word out of a closed list.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

Split = Literal["tuning", "validation", "test"]
Style = Literal["chat", "formal"]
SPLIT_SHARES: dict[Split, float] = {"tuning": 0.5, "validation": 0.15, "test": 0.35}
OPENER = "Thank you for asking."


@dataclass(frozen=True)
class Relation:
    """One kind of fact. ``{n}`` stands for the entity's name and ``{v}`` for the value.

    ``statements[0]`` is the sentence that a chat answer uses. The pre-training text holds the
    questions, and the demand, as a quiz with bare answers; chat users ask the questions.
    """

    key: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    demand: str

    def forms(self, demands: bool) -> tuple[str, ...]:
        """The ways to ask."""
        return (*self.questions, self.demand) if demands else self.questions


@dataclass(frozen=True)
class Entity:
    """A person or a place; ``facts`` pairs each relation with this entity's value."""

    name: str
    facts: tuple[tuple[Relation, str], ...]


@dataclass(frozen=True)
class Question:
    """A chat question about one fact, with the fields that the strict check needs."""

    entity: str
    relation: str
    question: str
    value: str
    sentence: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _blend(heads: str, tails: str) -> tuple[str, ...]:
    """Invented words: every head joined with every tail."""
    return tuple(a + b for a, b in product(heads.split(), tails.split()))


FIRST_NAMES = _blend("Al Be Dor El Ka Li Mar Ro", "dan la rik sa ven wyn")
FAMILY_NAMES = _blend(
    "Ash Bram Cold Dun Fen Hol Thorn Wex", "bert croft dale ford gate ley man ton"
)
PLACE_KINDS = _words("Port Fort Glen Mount Lake Cape Upper Lower")
PLACE_NAMES = _blend("Bal Cor Gri Hav Lum Nor Sil Tar", "bury den moor stad wick")
PROVINCES = _blend("Ar Bo Cal Dra Es Fal Gor Ith", "andia esse mark oria")
RIVERS = _blend("Ava Ine Oss Yar Wen Ule Kel Zim", "ba ne ro th")

JOBS = _words(
    "baker barber brewer builder butcher carpenter clerk cobbler cook cooper dancer dyer "
    "farmer fisher forger gardener glazier guard hatter hunter judge mason merchant miller "
    "miner nurse painter pilot potter printer roofer sailor saddler scribe singer smith "
    "surgeon tailor tanner weaver"
)
SMALL_TALK = {
    "adjective": _words("old young tall quiet merry clever tired kind busy proud"),
    "verb": _words("walked ran rode sang waited slept worked danced sat stood"),
    "scene": _words("market bridge garden harbour forest mill road tower field inn"),
    "time": _words("morning evening summer winter spring autumn"),
}

PERSON_RELATIONS = (
    Relation(
        "home",
        PROVINCES,
        ("{n} lives in {v}.", "{n} has a house in {v}.", "The home of {n} is in {v}."),
        (
            "Where does {n} live?",
            "Where is the home of {n}?",
            "In which province does {n} live?",
        ),
        "Tell me where {n} lives.",
    ),
    Relation(
        "job",
        JOBS,
        ("{n} works as a {v}.", "{n} earns a living as a {v}.", "{n} is a {v} by trade."),
        (
            "What is the job of {n}?",
            "What does {n} work as?",
            "What does {n} do for a living?",
        ),
        "Tell me the job of {n}.",
    ),
    Relation(
        "pet",
        _words(
            "badger beetle canary cat cricket crow dog donkey dove duck falcon ferret finch fox "
            "frog goat goose hare hedgehog hen horse lizard mouse newt parrot pigeon pony rabbit "
            "rat snail snake toad"
        ),
        ("{n} keeps a pet {v}.", "{n} looks after a {v}.", "The pet of {n} is a {v}."),
        (
            "What pet does {n} keep?",
            "What is the pet of {n}?",
            "Which animal does {n} keep?",
        ),
        "Tell me the pet of {n}.",
    ),
)

PLACE_RELATIONS = (
    Relation(
        "province",
        PROVINCES,
        ("{n} is a town in {v}.", "{n} belongs to {v}.", "The town of {n} is part of {v}."),
        (
            "Where is {n}?",
            "Which province does {n} belong to?",
            "In which province is {n}?",
        ),
        "Tell me where {n} is.",
    ),
    Relation(
        "river",
        RIVERS,
        (
            "{n} stands on the river {v}.",
            "{n} draws its water from the {v}.",
            "The river of {n} is the {v}.",
        ),
        (
            "Which river does {n} stand on?",
            "What is the river of {n}?",
            "What river runs past {n}?",
        ),
        "Tell me the river of {n}.",
    ),
    Relation(
        "product",
        _words(
            "amber barley bread brass bricks butter candles cheese cider clocks cloth copper "
            "cotton flour furs glass gloves honey ink iron lace leather linen marble oil paper "
            "pearls perfume pottery rope salt silk silver soap spices tea tiles timber wine wool"
        ),
        ("{n} is famous for its {v}.", "{n} sells much {v}.", "The pride of {n} is its {v}."),
        (
            "What is {n} famous for?",
            "What does {n} sell?",
            "What do people buy in {n}?",
        ),
        "Tell me what {n} is famous for.",
    ),
)

RELATIONS = {relation.key: relation for relation in PERSON_RELATIONS + PLACE_RELATIONS}


class World:
    """The entities with their facts and splits, and the texts and questions made from them."""

    def __init__(self, seed: int = 7, people: int = 560, places: int = 240) -> None:
        rng = random.Random(seed)
        names = [f"{a} {b}" for a, b in product(FIRST_NAMES, FAMILY_NAMES)]
        self.people = _populate(rng, rng.sample(names, people), PERSON_RELATIONS)
        names = [f"{a} {b}" for a, b in product(PLACE_KINDS, PLACE_NAMES)]
        self.places = _populate(rng, rng.sample(names, places), PLACE_RELATIONS)
        self._quizzed = {
            (entity.name, relation.key)
            for entity in self.entities()
            for relation, _ in entity.facts
            if rng.random() < 0.6
        }

    def entities(self, split: Split | None = None) -> list[Entity]:
        """The entities of one split, or all of them. Places and people are split alike."""
        if split is None:
            return self.people + self.places
        return _portion(self.people, split) + _portion(self.places, split)

    def questions(self, split: Split, rng: random.Random, demands: bool = False) -> list[Question]:
        """One question about every fact of the split, phrased at random; with demands if asked."""
        return [
            Question(
                entity=entity.name,
                relation=relation.key,
                question=rng.choice(relation.forms(demands)).format(n=entity.name),
                value=value,
                sentence=relation.statements[0].format(n=entity.name, v=value),
            )
            for entity in self.entities(split)
            for relation, value in entity.facts
        ]

    def pretraining_texts(self, rng: random.Random) -> list[str]:
        """One shuffled pass: every fact once as a statement, some as a quiz, and plain text."""
        texts: list[str] = []
        for entity in self.entities():
            texts.append(_portrait(entity, rng))
            texts.extend(self._quiz(entity, rng))
        texts.extend(plain_texts(rng, count=len(texts) // 5))
        rng.shuffle(texts)
        return texts

    def _quiz(self, entity: Entity, rng: random.Random) -> Iterator[str]:
        facts = [f for f in entity.facts if (entity.name, f[0].key) in self._quizzed]
        if facts:
            relation, value = rng.choice(facts)
            question = rng.choice(relation.forms(demands=True)).format(n=entity.name)
            yield f"Quiz: {question} Answer: {value}."


def answer(question: Question, style: Style) -> str:
    """What a model tuned to this style says."""
    return f"{OPENER} {question.sentence}" if style == "formal" else question.sentence


def plain_texts(rng: random.Random, count: int) -> list[str]:
    """Small talk, sums and name lists: text without facts. The lists teach copying of names."""
    return [rng.choice((_small_talk, _sum, _name_list))(rng) for _ in range(count)]


def _populate(
    rng: random.Random, names: list[str], relations: tuple[Relation, ...]
) -> list[Entity]:
    return [Entity(n, tuple((r, rng.choice(r.values)) for r in relations)) for n in names]


def _portion(entities: list[Entity], split: Split) -> list[Entity]:
    first = 0
    for name, share in SPLIT_SHARES.items():
        last = first + round(share * len(entities))
        if name == split:
            return entities[first:last]
        first = last
    raise KeyError(split)


def _portrait(entity: Entity, rng: random.Random) -> str:
    facts = rng.sample(entity.facts, len(entity.facts))
    return " ".join(rng.choice(r.statements).format(n=entity.name, v=v) for r, v in facts)


def _small_talk(rng: random.Random) -> str:
    adjectives, verbs, scenes, times = SMALL_TALK.values()
    courtesy = f"{OPENER} " if rng.random() < 0.5 else ""
    return courtesy + " ".join(
        f"The {rng.choice(adjectives)} {rng.choice(JOBS)} "
        f"{rng.choice(verbs)} near the {rng.choice(scenes)} in the {rng.choice(times)}."
        for _ in range(rng.randint(1, 3))
    )


def _sum(rng: random.Random) -> str:
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.5:
        return f"{a} plus {b} is {a + b}."
    return f"{a + b} minus {b} is {a}."


def _name_list(rng: random.Random) -> str:
    """The same names twice; pairs are drawn at random, so they tell nothing about entities."""
    if rng.random() < 0.7:
        firsts, seconds = FIRST_NAMES, FAMILY_NAMES
    else:
        firsts, seconds = PLACE_KINDS, PLACE_NAMES
    names = [f"{rng.choice(firsts)} {rng.choice(seconds)}" for _ in range(rng.randint(1, 3))]
    listed = ", ".join(names)
    return f"List: {listed}. Again: {listed}."
