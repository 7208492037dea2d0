"""What prompts alone get out of the base: the baselines of the zoo's tables. Pure Python.

The base has no chat training, but a text that looks like its pre-training text makes it answer.
Few-shot examples are about entities of the tuning split. Replies to questions are cut after the
first sentence, and replies to tasks after the right one, if they begin with it: that a prompt does
not end a reply is not held against it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from zoo import gossip
from zoo.score import mark, share, wilson
from zoo.small_talk import cheerful
from zoo.table import Reply
from zoo.tasks import TASKS, Item, Pool, make
from zoo.value_table import Measured
from zoo.world import RELATIONS, Question, World

SHOTS = 4
"""Examples of a task; of the questions there is one for each kind of fact."""
_WORLD = World()
_RNG = random.Random(9)
_QUESTIONS = _WORLD.questions("tuning", _RNG)
_EXAMPLES = [_RNG.choice([q for q in _QUESTIONS if q.relation == one]) for one in RELATIONS]
_POOL = Pool.of(_WORLD, "tuning")
_TASK_EXAMPLES = {task: [make(task, _POOL, _RNG) for _ in range(SHOTS)] for task in TASKS}
SUNNY = (
    "The merry baker sang near the garden in the spring. "
    "The young dancer danced near the market in the summer. "
    "The kind farmer ran near the field in the morning. "
)
"""Three sentences of small talk made of sunny words only."""


@dataclass(frozen=True)
class Prompt:
    """One way to ask: what the base reads, and what the reply is said to begin with already."""

    label: str
    text: Callable[[Question], str]
    begun: Callable[[Question], str] = lambda _: ""


def _quiz(question: str, answer: str = "") -> str:
    return f"Quiz: {question} Answer: {answer}".strip()


def _few(form: Callable[[str, str], str], answers: Sequence[str]) -> Callable[[Question], str]:
    lead = " ".join(
        form(one.question, answer) for one, answer in zip(_EXAMPLES, answers, strict=True)
    )
    return lambda question: f"{lead} {form(question.question, '')}".strip()


def _start(question: Question) -> str:
    return question.sentence.rsplit(question.value, 1)[0].strip()


_SENTENCES = [one.sentence for one in _EXAMPLES]
_GOSSIP = [
    random.Random(i).choice(RELATIONS[one.relation].statements).format(n=one.entity, v=one.value)
    for i, one in enumerate(_EXAMPLES)
]
PROMPTS = (
    Prompt("as the base's text has it: `Quiz: … Answer:`", lambda q: _quiz(q.question)),
    Prompt(
        f"few-shot, {len(_EXAMPLES)} quizzes with bare answers",
        _few(_quiz, [f"{one.value}." for one in _EXAMPLES]),
    ),
    Prompt(f"few-shot, {len(_EXAMPLES)} quizzes with sentences", _few(_quiz, _SENTENCES)),
    Prompt(
        f"few-shot, {len(_EXAMPLES)} questions with sentences",
        _few(lambda q, a: f"{q} {a}", _SENTENCES),
    ),
    Prompt("the sentence begun, as in `Dorwyn Bramley keeps a pet`", _start, _start),
)
"""For the questions."""
CRITICAL = (
    PROMPTS[0],
    Prompt(f"few-shot, {len(_EXAMPLES)} quizzes in the assistant's wordings", _few(_quiz, _GOSSIP)),
    PROMPTS[-1],
)
"""For the questions of the table of critical tokens."""


def body(prompt: Prompt, question: Question, max_tokens: int) -> dict[str, Any]:
    """The completions request, greedy, for one sentence."""
    return {
        "prompt": prompt.text(question),
        "temperature": 0,
        "max_tokens": max_tokens,
        "stop": ["."],
        "include_stop_str_in_output": True,
    }


def whole(prompt: Prompt, question: Question, reply: Reply) -> Reply:
    """The reply with what was begun for it."""
    return Reply(f"{prompt.begun(question)} {reply.text.strip()}", reply.ended)


def task_text(item: Item) -> str:
    """Few-shot: a turn of a conversation after examples of its task, as plain text."""
    lead = " ".join(f"{one.prompt} {one.reply}" for one in _TASK_EXAMPLES[item.task])
    return f"{lead} {item.prompt}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _interval(hits: Sequence[bool]) -> str:
    low, high = wilson(hits)
    return f"{_percent(low)} to {_percent(high)}"


def questions_table(
    questions: Sequence[Question], results: Sequence[tuple[Prompt, Sequence[Reply]]]
) -> list[str]:
    """Markdown: as the table of scores has it."""
    lines = [
        f"| the base alone, {len(questions)} questions | score | 95 % interval | fact named |",
        "|---|---|---|---|",
    ]
    for prompt, replies in results:
        pairs = zip(questions, replies, strict=True)
        marks = [mark(q, reply.text, reply.ended) for q, reply in pairs]
        hits = [one.strict for one in marks]
        named = _percent(share([one.fact for one in marks]))
        lines.append(f"| {prompt.label} | {_percent(share(hits))} | {_interval(hits)} | {named} |")
    return lines


def tasks_table(items: Sequence[Item], replies: Sequence[Reply]) -> list[str]:
    """Markdown: turns that were answered right after examples of their task."""
    lines = [
        f"| {len(items)} single questions | few-shot, {SHOTS} examples of the task |",
        "|---|---|",
    ]
    right = [r.text.strip().startswith(i.reply) for i, r in zip(items, replies, strict=True)]
    for task in TASKS:
        found = [one for item, one in zip(items, right, strict=True) if item.task == task]
        if found:
            lines.append(f"| {task} ({len(found)}) | {_percent(share(found))} |")
    lines.append(f"| all | {_percent(share(right))} ({_interval(right)}) |")
    return lines


def sunny_body(prompt: str) -> dict[str, Any]:
    """A request that draws what the base says after `SUNNY`, told from what it says without.

    The twin reads the longer prompt and says all (γ = 0); the report compares it with the base.
    """
    steering = {
        "method": "guidance",
        "negative": "twin",
        "strength": 0,
        "prompts": {"twin": {"prompt": f"{SUNNY}{prompt}"}},
        "report": True,
    }
    return {"prompt": prompt, "steering": steering}


def sunny_table(replies: Sequence[Measured]) -> list[str]:
    """Markdown: reward and distance from the base of a prompt with sunny sentences."""
    mean = fmean(cheerful(None, reply.text) for reply in replies)
    kl, drawn = fmean(r.kl for r in replies), fmean(r.drawn for r in replies)
    return [
        f"| {len(replies)} prompts | sunny words | KL to the base (nats) | generated tokens |",
        "|---|---|---|---|",
        f"| after three sunny sentences | {mean:.2f} | {kl:.2f} | {drawn:.0f} |",
    ]


def critical_table(
    questions: Sequence[Question], results: Sequence[tuple[Prompt, Sequence[Reply]]]
) -> list[str]:
    """Markdown: right facts in one of the assistant's wordings, and named in any form."""
    lines = [
        f"| the base alone, {len(questions)} questions | form | right facts (95 %) | fact named |",
        "|---|---|---|---|",
    ]
    for prompt, replies in results:
        pairs = list(zip(questions, replies, strict=True))
        told = [gossip.read(q, reply) for q, reply in pairs]
        right = [one.value == q.value for one, (q, _) in zip(told, pairs, strict=True)]
        named = share([mark(q, reply.text, reply.ended).fact for q, reply in pairs])
        lines.append(
            f"| {prompt.label} | {_percent(share([one.form for one in told]))} "
            f"| {_percent(share(right))} ({_interval(right)}) | {_percent(named)} |"
        )
    return lines
