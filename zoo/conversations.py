"""The held-out conversations of the tasks, and how they are held with a model. Pure Python.

In a conversation of n turns each turn is another task, as in MeteoRA's composite-n
(arXiv 2405.13053, section 4); n = 1 are the single tasks. The history is what really happened: the
model's own replies, right or wrong.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zoo.questions import FOLDER
from zoo.table import Reply
from zoo.tasks import TASKS, Item, Pool, conversation, make
from zoo.world import Split, World

LENGTHS = (1, 3, 5, 8)
"""Turns of a conversation."""
TURNS: dict[Split, int] = {"validation": 120, "test": 480}
"""How many turns of each length are kept per split: exactly so many, or a little less where the
length does not divide it."""
MAX_TOKENS = 32
"""Most tokens of a reply; the longest right one has 25."""

Conversation = tuple[Item, ...]
Message = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """A question that waits for its reply.

    ``messages`` are the conversation so far, the question last.
    """

    task: str
    messages: list[Message]


Answer = Callable[[Sequence[Asked]], Sequence[Reply]]
"""Answers questions of different conversations, in order."""


def write_conversations(world: World) -> None:
    """Write the validation and test files."""
    FOLDER.mkdir(exist_ok=True)
    for split, turns in TURNS.items():
        pool, rng = Pool.of(world, split), random.Random(41)
        singles = [[make(TASKS[i % len(TASKS)], pool, rng)] for i in range(turns)]
        longer = [
            conversation(pool, rng, length)
            for length in LENGTHS[1:]
            for _ in range(turns // length)
        ]
        lines = [json.dumps([asdict(item) for item in items]) for items in [*singles, *longer]]
        path_of(split).write_text("\n".join(lines) + "\n")


def path_of(split: Split) -> Path:
    """The file of a split."""
    return FOLDER / f"conversations-{split}.jsonl"


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of one file."""
    lines = path.read_text().splitlines()
    return [tuple(Item(**item) for item in json.loads(line)) for line in lines]


def hold(conversations: Sequence[Conversation], answer: Answer) -> list[list[Reply]]:
    """The replies of every conversation, turn by turn; all that wait are asked together."""
    histories: list[list[Message]] = [[] for _ in conversations]
    replies: list[list[Reply]] = [[] for _ in conversations]
    for turn in range(max(map(len, conversations))):
        waiting = [i for i, items in enumerate(conversations) if len(items) > turn]
        for i in waiting:
            histories[i].append({"role": "user", "content": conversations[i][turn].prompt})
        asked = [Asked(conversations[i][turn].task, list(histories[i])) for i in waiting]
        for i, reply in zip(waiting, answer(asked), strict=True):
            replies[i].append(reply)
            histories[i].append({"role": "assistant", "content": reply.text})
    return replies
