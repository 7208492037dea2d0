"""Small talk of the invented world, its prompts, and two rewards that pull apart. Pure Python.

The base goes on from the first words of a small-talk text for one to three sentences, each of words
drawn at random (`zoo.world`). ``cheerful`` counts the sunny ones, so a long text can have more
of it; ``terse`` charges for every word. Both have the signature that
``coxswain train value --reward FILE:FUNCTION`` calls.
"""

import random
import re
from typing import Any

from zoo.world import JOBS, OPENER, SMALL_TALK, SPLIT_SHARES, Split

_SUNNY_ADJECTIVES_AND_VERBS = ("merry", "young", "kind", "sang", "danced", "ran")
_SUNNY_PLACES_AND_TIMES = ("garden", "market", "field", "spring", "summer", "morning")
SUNNY = frozenset((*_SUNNY_ADJECTIVES_AND_VERBS, *_SUNNY_PLACES_AND_TIMES))
WORDS_PER_POINT = 10


def cheerful(_prompt: Any, reply: str) -> float:
    """How many sunny words the reply has."""
    return float(sum(word in SUNNY for word in _words(reply)))


def terse(_prompt: Any, reply: str) -> float:
    """Minus one for every ten words of the reply."""
    return -len(_words(reply)) / WORDS_PER_POINT


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def prompts(split: Split) -> list[str]:
    """First words of small-talk texts; the splits share none."""
    found = [
        f"{courtesy}The {adjective} {job}"
        for courtesy in ("", f"{OPENER} ")
        for adjective in SMALL_TALK["adjective"]
        for job in JOBS
    ]
    random.Random(3).shuffle(found)
    first = 0
    for name, share in SPLIT_SHARES.items():
        last = first + round(share * len(found))
        if name == split:
            return found[first:last]
        first = last
    raise KeyError(split)
