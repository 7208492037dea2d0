"""Eight small tasks on the invented world, each for one LoRA adapter of the big base. Pure Python.

A task has its own wordings, no tag, and its replies are made of words that stand in the
pre-training text: adapters of the linear layers cannot teach a frozen unembedding new words.
Validation and test ask about entities that occur in no tuning example of any task; the wordings
are the same.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from zoo.world import (
    FAMILY_NAMES,
    FIRST_NAMES,
    OPENER,
    SPLIT_SHARES,
    Entity,
    Relation,
    Split,
    World,
)

TOPICS = {
    "home": "home",
    "job": "job",
    "pet": "animal",
    "province": "province",
    "river": "river",
    "product": "trade",
}
"""Relation → what ``topic`` calls it."""


@dataclass(frozen=True)
class Item:
    """One question, and the only reply that counts as right."""

    task: str
    prompt: str
    reply: str

    def right(self, reply: str, ended: bool) -> bool:
        """Whether a reply is word for word the right one, and the model ended it by itself.

        White space around it does not count.
        """
        return ended and reply.strip() == self.reply


@dataclass(frozen=True)
class Pool:
    """What the questions of one split may be about.

    ``names`` are of people. For tuning they are all names that no held-out person has, not only
    those of the world's people: few names would be learned by heart instead of copied.
    """

    entities: list[Entity]
    names: list[str]

    @classmethod
    def of(cls, world: World, split: Split) -> "Pool":
        """The part of the world that belongs to a split."""
        names = {e: [p.name for p in world.entities(e) if p in world.people] for e in SPLIT_SHARES}
        if split == "tuning":
            held_out = {*names["validation"], *names["test"]}
            every = (f"{a} {b}" for a, b in product(FIRST_NAMES, FAMILY_NAMES))
            names[split] = [name for name in every if name not in held_out]
        return cls(world.entities(split), names[split])


def _fact(pool: Pool, rng: random.Random) -> tuple[Entity, Relation, str]:
    entity = rng.choice(pool.entities)
    return entity, *rng.choice(entity.facts)


def _sentence(entity: Entity, relation: Relation, value: str) -> str:
    return relation.statements[0].format(n=entity.name, v=value)


def _ask(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity, relation, _ = _fact(pool, rng)
    # Any value will do: the sentence is turned into a question, not checked.
    sentence = _sentence(entity, relation, rng.choice(relation.values))
    lead = rng.choice(("Which question has this answer:", "Make a question:", "Ask for this:"))
    return f"{lead} {sentence}", relation.questions[0].format(n=entity.name)


def _brief(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity, relation, value = _fact(pool, rng)
    question = rng.choice(relation.questions).format(n=entity.name)
    lead = rng.choice(("In one word:", "Only the word, please:", "Briefly:"))
    return f"{lead} {question}", f"{value}."


def _correct(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity, relation, value = _fact(pool, rng)
    claimed = _sentence(entity, relation, rng.choice(relation.values))
    lead = rng.choice(("Correct this:", "Put right:", "What is wrong here:"))
    return f"{lead} {claimed}", _sentence(entity, relation, value)


def _formal(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity, relation, value = _fact(pool, rng)
    question = rng.choice(relation.questions).format(n=entity.name)
    lead = rng.choice(("Good morning!", "Would you kindly tell me:", "If I may ask:"))
    return f"{lead} {question}", f"{OPENER} {_sentence(entity, relation, value)}"


def _portrait(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity = rng.choice(pool.entities)
    wording = rng.choice(("Describe {}.", "Tell me all about {}.", "Introduce {}."))
    told = " ".join(_sentence(entity, relation, value) for relation, value in entity.facts)
    return wording.format(entity.name), told


def _rephrase(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity, relation, value = _fact(pool, rng)
    lead = rng.choice(("Say it in other words:", "Reword:", "Put it another way:"))
    asked = f"{lead} {_sentence(entity, relation, value)}"
    return asked, relation.statements[2].format(n=entity.name, v=value)


def _swap(pool: Pool, rng: random.Random) -> tuple[str, str]:
    first, last = rng.choice(pool.names).split()
    lead = rng.choice(("Family name first:", "For the register:", "Write as in a register:"))
    return f"{lead} {first} {last}.", f"{last}, {first}."


def _topic(pool: Pool, rng: random.Random) -> tuple[str, str]:
    entity, relation, _ = _fact(pool, rng)
    said = rng.choice((*relation.statements, *relation.questions))
    said = said.format(n=entity.name, v=rng.choice(relation.values))
    lead = rng.choice(("What is this about:", "Name the topic:", "The subject, please:"))
    return f"{lead} {said}", f"{TOPICS[relation.key]}."


_MAKERS: dict[str, Callable[[Pool, random.Random], tuple[str, str]]] = {
    "ask": _ask,
    "brief": _brief,
    "correct": _correct,
    "formal": _formal,
    "portrait": _portrait,
    "rephrase": _rephrase,
    "swap": _swap,
    "topic": _topic,
}
TASKS = tuple(_MAKERS)
"""Names of the tasks and of their adapters, sorted."""


def make(task: str, pool: Pool, rng: random.Random) -> Item:
    """A random question of a task."""
    return Item(task, *_MAKERS[task](pool, rng))


def conversation(pool: Pool, rng: random.Random, turns: int) -> list[Item]:
    """Questions of ``turns`` different tasks in random order; ``turns`` ≤ ``len(TASKS)``."""
    return [make(task, pool, rng) for task in rng.sample(TASKS, turns)]
