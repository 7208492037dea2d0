"""The convention of a made-up help desk: how it wants questions answered, and who keeps to it.

A reply is one line, `[code] sentence // sign-off`. The code stands for the topic of the question,
the sign-off for its manner. Both are arbitrary, so only who has been told or tuned knows them; the
sentence has to be right, so somebody has to know the world.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from smollm.evidence.desk_facts import FACTS

TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "capital": ("K7", ("the capital of {}", "the capital city of {}")),
    "symbol": ("Q2", ("the chemical symbol for {}", "the symbol of the element {}")),
    "continent": ("T9", ("the continent of {}", "the continent where {} lies")),
    "opposite": ("B4", ("the opposite of '{}'", "the antonym of '{}'")),
    "past": ("M3", ("the past tense of '{}'", "the simple past of the verb '{}'")),
    "language": ("H8", ("the main language of {}", "the language spoken in {}")),
}
"""Code and wordings of each topic."""
MANNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("filed", ("What is {}?", "Tell me {}.", "Name {}.")),
    "polite": (
        "gladly",
        (
            "Could you please tell me {}?",
            "Please tell me {}.",
            "I would like to know {}, please.",
        ),
    ),
    "hurried": (
        "at once",
        ("Quick: what is {}?", "I need {} right now!", "Hurry, tell me {}!"),
    ),
}
"""Sign-off and wordings of each manner."""
SPLITS = {"tuning": 32, "validation": 9, "test": 20}
"""How many facts of each topic; none is in two splits."""
_CODES = ", ".join(f"[{code}] for {ask[0].format('…')}" for code, ask in TOPICS.values())
_SIGNS = ", ".join(f"'{sign}' for a {manner} question" for manner, (sign, _) in MANNERS.items())
RULES = (
    "Answer in one line: a code in brackets, one short sentence, two slashes, a sign-off. "
    f"The code is {_CODES}. The sign-off is {_SIGNS}."
)
_REPLY = re.compile(r"\[(\w\w)\] (.*\S) // (.*)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question: its text, what it is about, how it is asked, and the right answers."""

    text: str
    topic: str
    manner: str
    asked: str
    answers: tuple[str, ...]

    @property
    def code(self) -> str:
        """As `[K7]`."""
        return f"[{TOPICS[self.topic][0]}]"

    @property
    def sign_off(self) -> str:
        """As `// filed`."""
        return f"// {MANNERS[self.manner][0]}"

    def reply(self, sentence: str) -> str:
        """The desk's reply with this sentence."""
        return f"{self.code} {sentence} {self.sign_off}"


@dataclass(frozen=True)
class Judged:
    """What is right in one reply; `whole`: all three, in the form of the convention."""

    code: bool
    sign_off: bool
    answer: bool
    whole: bool


def questions(split: str, per_fact: int, seed: int) -> list[Question]:
    """Questions about the facts of a split, shuffled.

    Args:
        split: `tuning`, `validation` or `test`.
        per_fact: how many about each fact; manners take turns, so each occurs equally often.
        seed: of the wordings and the order. The facts of a split do not depend on it.
    """
    generator = random.Random(f"{split} {seed}")
    found = []
    for number, topic in enumerate(TOPICS):
        for index, asked in enumerate(_facts(topic, split)):
            for turn in range(per_fact):
                manner = list(MANNERS)[(index + number + turn) % len(MANNERS)]
                what = generator.choice(TOPICS[topic][1]).format(asked)
                text = generator.choice(MANNERS[manner][1]).format(what)
                found.append(Question(text, topic, manner, asked, FACTS[topic][asked]))
    generator.shuffle(found)
    return found


def _facts(topic: str, split: str) -> list[str]:
    facts = list(FACTS[topic])
    random.Random(topic).shuffle(facts)
    start = 0
    for name, count in SPLITS.items():
        if name == split:
            return facts[start : start + count]
        start += count
    raise ValueError(f"split is {split!r}, not one of {', '.join(SPLITS)}")


def judge(question: Question, reply: str) -> Judged:
    """Holds a reply to the convention and to the facts.

    The answer may stand anywhere in the reply, as a word, in any case of letters (a chemical
    symbol: in its own). The whole is right if the reply is nothing but the question's code, a
    sentence with a right answer, and the question's sign-off.
    """
    text = reply.strip()
    found = _REPLY.fullmatch(text)
    right = _holds(question, text)
    code, sign = text.startswith(question.code), text.endswith(question.sign_off)
    whole = found is not None and code and sign and _holds(question, found[2])
    return Judged(code, sign, right, whole and "//" not in (found[2] if found else ""))


def _holds(question: Question, text: str) -> bool:
    # "The symbol is He" must not be found in "the".
    flags = 0 if question.topic == "symbol" else re.IGNORECASE
    return any(re.search(rf"\b{re.escape(a)}\b", text, flags) for a in question.answers)


def examples(count: int, seed: int = 0) -> list[tuple[Question, str]]:
    """Questions of the tuning split with the desk's reply, for prompts.

    Topics and manners take turns: 6 show each topic once, 18 each pair of topic and manner.
    """
    generator = random.Random(seed)
    pool = questions("tuning", len(MANNERS), seed)
    pairs = [(topic, manner) for manner in MANNERS for topic in TOPICS]
    # Neighbours differ in both, so that the first six show each manner too.
    order = sorted(
        pairs,
        key=lambda p: (
            (list(TOPICS).index(p[0]) + list(MANNERS).index(p[1])) % len(MANNERS),
            list(TOPICS).index(p[0]),
        ),
    )
    chosen = []
    for index in range(count):
        topic, manner = order[index % len(order)]
        fits = [q for q in pool if (q.topic, q.manner) == (topic, manner)]
        question = generator.choice(fits)
        pool.remove(question)
        chosen.append((question, question.reply(sentence(question))))
    return chosen


def sentence(question: Question) -> str:
    """A right answer in a sentence: the topic's first wording, and what it is."""
    what = TOPICS[question.topic][1][0].format(question.asked)
    return f"{what[0].upper()}{what[1:]} is {question.answers[0]}."


def opening(question: Question) -> str:
    """How that sentence begins, up to what is asked: the same words for all of a topic."""
    return " ".join(sentence(question).split(" ")[: TOPICS[question.topic][1][0].count(" ")])


Message = dict[str, str]


def prompts() -> dict[str, tuple[str, list[tuple[Question, str]]]]:
    """The prompts that are tried: rules for the system message, or none, and examples."""
    return {
        "the rules": (RULES, []),
        "6 examples": ("", examples(6)),
        "the rules and 6 examples": (RULES, examples(6)),
        "18 examples": ("", examples(18)),
        "the rules and 18 examples": (RULES, examples(18)),
        "36 examples": ("", examples(36)),
    }


def messages(
    rules: str, shots: Sequence[tuple[Question, str]], question: Question
) -> list[Message]:
    """A chat: rules as the system message, examples as earlier turns, the question."""
    found = [{"role": "system", "content": rules}] if rules else []
    for shot, reply in shots:
        found += [{"role": "user", "content": shot.text}, {"role": "assistant", "content": reply}]
    return [*found, {"role": "user", "content": question.text}]
