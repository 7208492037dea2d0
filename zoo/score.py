"""The strict check of a reply, and intervals for shares. Pure Python."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from zoo.world import OPENER, RELATIONS, Question


@dataclass(frozen=True)
class Marks:
    """What is right about one reply."""

    fact: bool
    """The right value stands somewhere in the reply."""
    form: bool
    """The reply is the chat answer sentence about the entity asked for, whatever the value."""
    ended: bool
    """The reply ended by itself, within its tokens."""

    @property
    def strict(self) -> bool:
        """The right fact, in the chat form, ended."""
        return self.fact and self.form and self.ended


def mark(question: Question, reply: str, ended: bool) -> Marks:
    """Check one reply; white space around it does not count."""
    text = reply.strip()
    pattern = re.escape(RELATIONS[question.relation].statements[0])
    pattern = pattern.replace(r"\{n\}", re.escape(question.entity)).replace(r"\{v\}", r"\w+")
    fact = re.search(rf"\b{re.escape(question.value)}\b", text) is not None
    return Marks(fact=fact, form=re.fullmatch(pattern, text) is not None, ended=ended)


def style(question: Question, reply: str) -> str:
    """``formal`` (courteous opener), ``direct`` (the chat answer sentence at once) or ``other``."""
    if reply.strip().startswith(OPENER):
        return "formal"
    return "direct" if mark(question, reply, ended=True).form else "other"


def share(hits: Sequence[bool]) -> float:
    """The share of true entries, 0 to 1."""
    return sum(hits) / len(hits)


def wilson(hits: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share (95 % at the default ``z``)."""
    n, p = len(hits), share(hits)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def gap_closed(score: float, base: float, ceiling: float) -> float:
    """How much of the way from the base to the ceiling was covered; 1 is the ceiling."""
    return (score - base) / (ceiling - base)
