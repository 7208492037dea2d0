"""The rule of the trades: what only the small tuned model has learned. Pure Python.

Since the base was trained, every trade has a place of its own to work at: all bakers near the mill,
say. No text of the base has the rule. A right answer needs it, and the person's job, of which the
small models know few: "Dorwyn Bramley works as a clerk near the bridge."
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.score import share, wilson
from zoo.table import Reply
from zoo.world import JOBS, SMALL_TALK, Split, World

NAME = "trades"
"""The stream of the small model that was tuned to the rule."""
QUESTIONS = (
    "Where does {n} work?",
    "In which place does {n} work?",
    "What is the job of {n}, and where?",
)
MAX_TOKENS = 24


def _places() -> dict[str, str]:
    """Every job with its place; each place has as many jobs."""
    scenes = SMALL_TALK["scene"]
    places = [scenes[i % len(scenes)] for i in range(len(JOBS))]
    random.Random(31).shuffle(places)
    return dict(zip(JOBS, places, strict=True))


RULE = _places()


@dataclass(frozen=True)
class Asked:
    """One question, and the only reply that counts as right."""

    name: str
    job: str
    question: str

    @property
    def reply(self) -> str:
        """The person's job, and the place that the rule gives it."""
        return f"{self.name} works as a {self.job} near the {RULE[self.job]}."


@dataclass(frozen=True)
class Marks:
    """What is right about one reply."""

    job: bool
    rule: bool
    """The place is that of the job that the reply names, right or wrong."""
    whole: bool
    """Word for word the right reply, ended."""


def asked(world: World, split: Split) -> list[Asked]:
    """One question about every person of a split."""
    rng = random.Random(32)
    people = [one for one in world.entities(split) if one in world.people]
    jobs = [{r.key: v for r, v in one.facts}["job"] for one in people]
    return [
        Asked(one.name, job, rng.choice(QUESTIONS).format(n=one.name))
        for one, job in zip(people, jobs, strict=True)
    ]


def mark(one: Asked, reply: Reply) -> Marks:
    """Checks one reply; white space around it does not count."""
    text = reply.text.strip()
    return Marks(
        job=f"works as a {one.job}" in text,
        rule=any(f"{job} near the {place}." in text for job, place in RULE.items()),
        whole=reply.ended and text == one.reply,
    )


_EXAMPLES = asked(World(), "tuning")
_TABLE = " ".join(f"A {job} works near the {place}." for job, place in RULE.items())


def _few(count: int, form: str) -> str:
    return " ".join(form.format(q=e.question, a=e.reply) for e in _EXAMPLES[:count])


def _begun(one: Asked) -> str:
    return f"{one.name} works as a"


_PLAIN, _QUIZ = "{q} {a}", "Quiz: {q} Answer: {a}"
PROMPTS: dict[str, tuple[Callable[[Asked], str], Callable[[Asked], str]]] = {
    "few-shot, 16 questions": (lambda o: f"{_few(16, _PLAIN)} {o.question}", lambda _: ""),
    "few-shot, 12 quizzes": (lambda o: f"{_few(12, _QUIZ)} Quiz: {o.question} Answer:",
                             lambda _: ""),
    "the rule in full, then the question": (lambda o: f"{_TABLE} {o.question}", lambda _: ""),
    "the rule in full, 4 examples": (lambda o: f"{_TABLE} {_few(4, _PLAIN)} {o.question}",
                                     lambda _: ""),
    "the rule in full, the sentence begun": (lambda o: f"{_TABLE} {_begun(o)}", _begun),
    "few-shot, 16 sentences, the sentence begun": (
        lambda o: f"{' '.join(e.reply for e in _EXAMPLES[:16])} {_begun(o)}", _begun),
}  # fmt: skip
"""Label → what the base reads, and what the reply is said to begin with already."""
TWO_PROMPTS = "two prompts: the job, then the rule in full"


def steered(strength: float) -> dict[str, Any]:
    """Proxy-tuning with the small model that knows the rule."""
    steering = {"method": "proxy_tuning", "expert": NAME, "anti_expert": "plain"}
    return {"steering": {**steering, "strength": strength}}


SETTINGS: dict[str, dict[str, Any]] = {
    "base alone": {},
    "small tuned model alone (trades-small)": {
        "steering": {"method": "mix", "weights": {"base": 0.0, NAME: 1.0}}
    },
    **{f"proxy-tuning, strength {a:g}": steered(a) for a in (0.75, 1.0, 1.25, 1.5)},
}
"""Label → fields of the chat request."""


def looked_up(reply: Reply) -> str:
    """The second of two prompts: the rule in full, then the job that the first one brought out."""
    return f"{_TABLE} A {reply.text.strip().rstrip('.')} works near the"


def joined(one: Asked, first: Reply, second: Reply) -> Reply:
    """The sentence made of the first words of both replies."""
    job, place = (reply.text.split()[0].rstrip(".") for reply in (first, second))
    return Reply(f"{_begun(one)} {job} near the {place}.", True)


def line(label: str, questions: Sequence[Asked], replies: Sequence[Reply]) -> str:
    """A row of the table."""
    marks = [mark(one, reply) for one, reply in zip(questions, replies, strict=True)]
    whole = [one.whole for one in marks]
    low, high = wilson(whole)
    cells = [
        _percent(share(whole)),
        f"{_percent(low)} to {_percent(high)}",
        _percent(share([one.job for one in marks])),
        _percent(share([one.rule for one in marks])),
    ]
    return f"| {label} | {' | '.join(cells)} |"


def head(count: int) -> list[str]:
    """The first lines of the table."""
    title = f"| {count} questions on the trades | right | 95 % interval | job | rule kept |"
    return [title, "|---|---|---|---|---|"]


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
