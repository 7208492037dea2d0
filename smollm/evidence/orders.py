"""Instructions that a program can check, in the manner of IFEval.

Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911:
kinds of instructions and how they are checked; the texts here are our own.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


TASKS = (
    "Write a short text about {topic}.",
    "Tell me a short fact about {topic}.",
    "Describe {topic} briefly.",
    "Say briefly why people like {topic}.",
)
TOPICS = _list(
    "the ocean, cats, coffee, winter, trains, the moon, gardens, music, bread, football, rain, "
    "mountains, old books, horses, bicycles, honey, birthdays, castles, the desert, dogs, islands, "
    "chess, tea, bridges, forests, clocks, cooking, the sun, elephants, paintings, libraries, "
    "rivers, cheese, snow, airplanes, flowers, markets, dancing, lighthouses, dreams"
)
WORDS = _list(
    "window, golden, quiet, river, seven, journey, paper, friend, stone, orange, morning, circle, "
    "yesterday, garden, silver, winter, story, bright, letter, engine"
)
FREQUENT = ("the", "and", "is", "a", "of", "it", "to")
ENDINGS = ("That is all.", "Thank you for reading.", "What do you think?", "The end.")
STARTS = ("Listen:", "Dear friend,", "Once upon a time", "In short,")
FREQUENT_IN = {
    "English": _list("the, is, and, of, to, in, that, it, are, for, with, as, was, on, a, an"),
    "French": _list(
        "le, la, les, des, est, une, un, et, dans, pour, qui, que, sont, du, avec, sur, il, elle"
    ),
    "Spanish": _list(
        "el, la, los, las, es, una, un, y, en, para, que, son, del, con, por, se, su, como, más"
    ),
    "German": _list(
        "der, die, das, ist, eine, ein, und, in, für, sind, mit, auf, es, den, dem, von, zu, nicht"
    ),
}


@dataclass(frozen=True)
class Order:
    """A task about a topic, an instruction, and whether a reply obeys it."""

    kind: str
    task: str
    topic: str
    instruction: str
    check: Callable[[str], bool]

    def obeyed(self, text: str, ended: bool) -> bool:
        """Whether a reply, ended by the model or cut off, does what was asked.

        It must also name the topic, but where it is in another language, and it may not be that of
        a few-shot example: those obey their instruction, so to copy one would be enough.
        """
        about = self.kind == "language" or stem(self.topic) in text.lower()
        copied = any(text.strip() == reply for _, reply in SHOTS.values())
        return about and not copied and (ended or self.kind not in WHOLE) and self.check(text)


def stem(topic: str) -> str:
    """What forms of a topic's last word share."""
    word = topic.split()[-1]
    for end in ("ies", "ing", "s"):
        if word.endswith(end) and len(word) - len(end) >= 3:
            return word.removesuffix(end)
    return word


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def _language(name: str) -> Callable[[str], bool]:
    def obeyed(text: str) -> bool:
        words = _words(text)
        counts = {one: sum(w in frequent for w in words) for one, frequent in FREQUENT_IN.items()}
        own = counts.pop(name)
        return len(words) >= 5 and own >= 0.12 * len(words) and own > max(counts.values())

    return obeyed


def _is_json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip()).strip()
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _bullets(count: int) -> Callable[[str], bool]:
    return lambda text: sum(bool(re.match(r"[*\-•] ", line)) for line in _lines(text)) == count


def _numbered(count: int) -> Callable[[str], bool]:
    return lambda text: (
        [m[1] for line in _lines(text) if (m := re.match(r"(\d+)[.)] ", line))]
        == [str(i + 1) for i in range(count)]
    )


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?:\s|$)", text.strip()))


def _required(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    word = rng.choice(WORDS)
    return f'Use the word "{word}".', lambda text: word in _words(text)


def _forbidden(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    word = rng.choice(FREQUENT)
    # An empty reply would obey, too.
    return (
        f'Do not use the word "{word}".',
        lambda text: word not in _words(text) and len(_words(text)) >= 5,
    )


def _ends(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    end = rng.choice(ENDINGS)
    return (
        f'End your reply with the words "{end}"',
        lambda text: text.strip().strip('"').lower().endswith(end.lower()),
    )


def _starts(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    start = rng.choice(STARTS)
    return (
        f'Begin your reply with the words "{start}"',
        lambda text: text.strip().strip('"').lower().startswith(start.lower()),
    )


def _speaks(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    name = rng.choice(("French", "German", "Spanish"))
    return f"Reply in {name}.", _language(name)


def _short(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    most = rng.choice((10, 15, 20))
    return f"Use at most {most} words.", lambda text: 3 <= len(_words(text)) <= most


def _listed(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    count = rng.choice((2, 3, 4))
    return f'Write exactly {count} bullet points, each beginning with "- ".', _bullets(count)


def _counted(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    count = rng.choice((2, 3))
    return f"Write a numbered list with exactly {count} items.", _numbered(count)


KINDS: dict[str, Callable[[random.Random], tuple[str, Callable[[str], bool]]]] = {
    "required word": _required,
    "forbidden word": _forbidden,
    "lower case": lambda _: (
        "Use lower case letters only, no capital letters.",
        lambda text: bool(_words(text)) and text == text.lower(),
    ),
    "upper case": lambda _: (
        "WRITE IN CAPITAL LETTERS ONLY.",
        lambda text: bool(_words(text)) and text == text.upper(),
    ),
    "language": _speaks,
    "at most so many words": _short,
    "one sentence": lambda _: (
        "Reply with exactly one sentence.",
        lambda text: _sentences(text) == 1 and len(_lines(text)) == 1,
    ),
    "bullet points": _listed,
    "numbered list": _counted,
    "begins with": _starts,
    "ends with": _ends,
    "quotes": lambda _: (
        "Put your whole reply in double quotation marks.",
        lambda text: len(text.strip()) > 2 and text.strip()[0] == text.strip()[-1] == '"',
    ),
    "title": lambda _: (
        "Begin with a title in double angle brackets, such as <<A title>>.",
        lambda text: re.match(r"\s*<<[^<>\n]+>>", text) is not None,
    ),
    "no commas": lambda _: (
        "Do not use any commas.",
        lambda text: "," not in text and len(_words(text)) >= 5,
    ),
    "JSON": lambda _: ('Reply with a JSON object with the one key "text".', _is_json),
    "question": lambda _: (
        "Write questions only: every sentence ends with a question mark.",
        lambda text: "?" in text and not re.search(r"[.!](?:\s|$)", text.strip()),
    ),
}
"""Kinds of instructions: each makes one with its check."""


WHOLE = (
    "at most so many words",
    "one sentence",
    "bullet points",
    "numbered list",
    "ends with",
    "quotes",
    "JSON",
)
"""Kinds that judge a reply as a whole: one that was cut off does not obey them."""

SHOTS = {
    "required word": (
        'Tell me about bees. Use the word "summer".',
        "Bees gather nectar all summer and turn it into honey.",
    ),
    "forbidden word": (
        'Tell me about bees. Do not use the word "they".',
        "Bees gather nectar from flowers and turn nectar into honey.",
    ),
    "lower case": (
        "Tell me about bees. Use lower case letters only, no capital letters.",
        "bees gather nectar from flowers and turn it into honey.",
    ),
    "upper case": (
        "Tell me about bees. WRITE IN CAPITAL LETTERS ONLY.",
        "BEES GATHER NECTAR FROM FLOWERS AND TURN IT INTO HONEY.",
    ),
    "language": (
        "Tell me about bees. Reply in French.",
        "Les abeilles cherchent le nectar des fleurs et elles font du miel.",
    ),
    "at most so many words": (
        "Tell me about bees. Use at most 8 words.",
        "Bees turn the nectar of flowers into honey.",
    ),
    "one sentence": (
        "Tell me about bees. Reply with exactly one sentence.",
        "Bees gather nectar from flowers and turn it into honey.",
    ),
    "bullet points": (
        'Tell me about bees. Write exactly 2 bullet points, each beginning with "- ".',
        "- Bees gather nectar.\n- Bees make honey.",
    ),
    "numbered list": (
        "Tell me about bees. Write a numbered list with exactly 2 items.",
        "1. Bees gather nectar.\n2. Bees make honey.",
    ),
    "begins with": (
        'Tell me about bees. Begin your reply with the words "Good news:"',
        "Good news: Bees turn the nectar of flowers into honey.",
    ),
    "ends with": (
        'Tell me about bees. End your reply with the words "I am done."',
        "Bees gather nectar from flowers and turn it into honey. I am done.",
    ),
    "quotes": (
        "Tell me about bees. Put your whole reply in double quotation marks.",
        '"Bees gather nectar from flowers and turn it into honey."',
    ),
    "title": (
        "Tell me about bees. Begin with a title in double angle brackets, such as <<A title>>.",
        "<<The life of bees>>\nBees gather nectar from flowers and turn it into honey.",
    ),
    "no commas": (
        "Tell me about bees. Do not use any commas.",
        "Bees gather nectar from flowers and turn it into honey.",
    ),
    "JSON": (
        'Tell me about bees. Reply with a JSON object with the one key "text".',
        '{"text": "Bees gather nectar from flowers and turn it into honey."}',
    ),
    "question": (
        "Tell me about bees. Write questions only: every sentence ends with a question mark.",
        "Do bees gather nectar from flowers? Do they turn it into honey?",
    ),
}
"""Of each kind, an instruction and a reply that obeys it, for few-shot prompts."""


def orders(count: int, seed: str) -> list[Order]:
    """So many, the kinds in turn."""
    rng = random.Random(seed)
    names = list(KINDS)
    found = []
    for i in range(count):
        kind = names[i % len(names)]
        instruction, check = KINDS[kind](rng)
        topic = rng.choice(TOPICS)
        task = rng.choice(TASKS).format(topic=topic)
        found.append(Order(kind, task, topic, instruction, check))
    return found
