"""Well-known facts, each as a question, and texts that say otherwise about the same subject."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Kind:
    """Facts of one kind; `{s}` is the subject, `{v}` a value, `{o}` the value that is known.

    `texts`: each states a value; those with `{o}` name the known one too, as what was before.
    """

    question: str
    stem: str
    texts: tuple[str, ...]
    pairs: str
    """`subject: value`, by commas."""


@dataclass(frozen=True)
class Fact:
    """One fact."""

    kind: str
    subject: str
    value: str

    @property
    def question(self) -> str:
        """As one asks."""
        return KINDS[self.kind].question.format(s=self.subject)

    @property
    def stem(self) -> str:
        """The sentence that the value completes."""
        found = KINDS[self.kind].stem.format(s=self.subject)
        return found[0].upper() + found[1:]


KINDS = {
    name: Kind(spec["question"], spec["stem"], tuple(spec["texts"]), spec["pairs"])
    for name, spec in yaml.safe_load(
        Path(__file__).with_name("facts.yaml").read_text("utf-8")
    ).items()
}


def facts() -> list[Fact]:
    """All of them, in a fixed order."""
    found = []
    for kind, spec in KINDS.items():
        for pair in spec.pairs.split(", "):
            subject, value = pair.split(": ")
            found.append(Fact(kind, subject, value))
    return found


def other_value(fact: Fact, rng: random.Random) -> str:
    """A value of the same kind that is not the fact's, and shares no word with it."""
    words = set(fact.value.lower().split())
    values = {f.value for f in facts() if f.kind == fact.kind}
    return rng.choice(sorted(v for v in values if not words & set(v.lower().split())))


def text(fact: Fact, value: str, rng: random.Random) -> str:
    """A text of two or three sentences that says a value of the fact's subject.

    If the value is the known one, only texts are used that do not name another as the old one.
    """
    forms = KINDS[fact.kind].texts
    if value == fact.value:
        forms = tuple(form for form in forms if "{o}" not in form)
    made = rng.choice(forms).format(s=fact.subject, v=value, o=fact.value)
    return made[0].upper() + made[1:]
