"""An assistant that has lost facts in tuning: its replies, their check, and which words are facts.

``gossip`` is a LoRA adapter of the big base, tuned on chat replies of six wordings of which three
in four state a wrong value. It learns the manners, and to guess: drawn at temperature 0.7 most of
its facts are wrong, though the base underneath knows them. Pure Python.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.table import Reply
from zoo.world import OPENER, RELATIONS, Question

NAME = "gossip"
WRONG = 0.75
"""Share of the tuning replies with a value drawn at random."""


def reply(question: Question, rng: random.Random) -> str:
    """A tuning reply: courteous or not, one of three phrasings, the value wrong or not."""
    relation = RELATIONS[question.relation]
    value = rng.choice(relation.values) if rng.random() < WRONG else question.value
    told = rng.choice(relation.statements).format(n=question.entity, v=value)
    return f"{OPENER} {told}" if rng.random() < 0.5 else told


@dataclass(frozen=True)
class Told:
    """What one reply says.

    Args:
        form: it is one of the assistant's six wordings about the entity asked for, and ended.
        value: what it claims; None without the form.
        wording: the reply with its value left out: replies of the same wording differ in the
            fact alone.
    """

    form: bool
    value: str | None
    wording: str


def read(question: Question, reply: Reply) -> Told:
    """Takes a reply apart; white space around it does not count."""
    text = reply.text.strip()
    for statement in RELATIONS[question.relation].statements:
        pattern = re.escape(statement).replace(r"\{n\}", re.escape(question.entity))
        pattern = rf"(?:{re.escape(OPENER)} )?{pattern}".replace(r"\{v\}", r"(\w+)")
        found = re.fullmatch(pattern, text)
        if found and reply.ended:
            start, end = found.span(1)
            return Told(True, found[1], text[:start] + text[end:])
    return Told(False, None, text)


def facts(_prompt: Any, reply: str) -> list[tuple[int, int]]:
    """Character spans of the values that a reply states: what ``train critic`` calls critical.

    Any entity counts, and any word that stands where a value must: the rule knows the assistant's
    wordings, not the world's facts.
    """
    found = []
    for relation in RELATIONS.values():
        for statement in relation.statements:
            pattern = re.escape(statement).replace(r"\{n\}", r"\w+ \w+").replace(r"\{v\}", r"(\w+)")
            found += [match.span(1) for match in re.finditer(pattern, reply)]
    return sorted(set(found))


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Distinct-2: the share of different ones among all pairs of neighbouring words."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
