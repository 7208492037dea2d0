"""The table of the adapters: the base, the right adapter by hand, the pack told nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.conversations import LENGTHS, Conversation
from zoo.score import share, wilson
from zoo.table import Reply
from zoo.tasks import TASKS

TOP_K, TEMPERATURE = 2, 4.0
"""The pack's k and T, chosen on the validation conversations."""


@dataclass(frozen=True)
class Setting:
    """One way to ask: ``adapters`` is the request's field; by hand, ``model`` is the task."""

    label: str
    by_hand: bool = False
    adapters: tuple[dict[str, Any], ...] = ()


def pack(top_k: int, temperature: float) -> Setting:
    """The pack with its own k and T."""
    fields = {"name": "pack", "top_k": top_k, "temperature": temperature}
    return Setting(f"the pack, k = {top_k}, T = {temperature:g}", adapters=(fields,))


BASE = Setting("base alone")
BY_HAND = Setting("the right adapter, by hand", by_hand=True)
PACK = pack(TOP_K, TEMPERATURE)
SETTINGS = (BASE, BY_HAND, PACK)

Result = tuple[Setting, Sequence[Sequence[Reply]]]


def hits(conversations: Sequence[Conversation], replies: Sequence[Sequence[Reply]]) -> list[bool]:
    """Which turns were answered right, conversation by conversation."""
    return [
        item.right(reply.text, reply.ended)
        for items, told in zip(conversations, replies, strict=True)
        for item, reply in zip(items, told, strict=True)
    ]


def markdown(conversations: Sequence[Conversation], results: Sequence[Result]) -> str:
    """Two tables: by length of the conversation, and the single questions by task."""
    return "\n".join([*_by_length(conversations, results), "", *_by_task(conversations, results)])


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _some(
    conversations: Sequence[Conversation],
    replies: Sequence[Sequence[Reply]],
    length: int,
    task: str | None = None,
) -> list[bool]:
    pairs = [
        (items, told)
        for items, told in zip(conversations, replies, strict=True)
        if len(items) == length and task in (None, items[0].task)
    ]
    return hits([items for items, _ in pairs], [told for _, told in pairs])


def _by_length(conversations: Sequence[Conversation], results: Sequence[Result]) -> list[str]:
    lengths = [n for n in LENGTHS if any(len(items) == n for items in conversations)]
    turns = [sum(len(items) for items in conversations if len(items) == n) for n in lengths]
    heads = [
        f"{'single' if n == 1 else f'composite-{n}'} ({count})"
        for n, count in zip(lengths, turns, strict=True)
    ]
    lines = [f"| turns right | {' | '.join(heads)} | mean |", "|---" * (len(heads) + 2) + "|"]
    for setting, replies in results:
        cells, shares = [], []
        for length in lengths:
            found = _some(conversations, replies, length)
            low, high = wilson(found)
            shares.append(share(found))
            cells.append(f"{_percent(shares[-1])} ({_percent(low)} to {_percent(high)})")
        mean = _percent(sum(shares) / len(shares))
        lines.append(f"| {setting.label} | {' | '.join(cells)} | {mean} |")
    return lines


def _by_task(conversations: Sequence[Conversation], results: Sequence[Result]) -> list[str]:
    labels = " | ".join(setting.label for setting, _ in results)
    lines = [f"| single questions | {labels} |", "|---" * (len(results) + 1) + "|"]
    for task in TASKS:
        found = [_some(conversations, replies, 1, task) for _, replies in results]
        if found[0]:
            cells = " | ".join(_percent(share(each)) for each in found)
            lines.append(f"| {task} ({len(found[0])}) | {cells} |")
    return lines
