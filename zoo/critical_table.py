"""Collaborative decoding of critical tokens: its settings, what is measured, and the table.

Pure Python. Every test question is answered ``DRAWS`` times, at temperature 0.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from zoo import gossip
from zoo.score import share, wilson
from zoo.table import Reply
from zoo.world import Question

DRAWS = 8
TEMPERATURE = 0.7
MAX_TOKENS = 32

_GOSSIP = [{"name": gossip.NAME}]
_RULE = {"method": "critical_tokens", "pretrained": "twin", "classifier": "critic"}


@dataclass(frozen=True)
class Setting:
    """One way to ask: the request's ``steering`` and ``adapters`` fields, absent where None."""

    label: str
    steering: dict[str, Any] | None
    adapters: list[dict[str, Any]] | None


SETTINGS = (
    Setting("aligned (the base with gossip)", None, _GOSSIP),
    Setting("pretrained (the base)", None, None),
    Setting("collaborative, hard, threshold 0.5", {**_RULE, "threshold": 0.5}, _GOSSIP),
    Setting("collaborative, hard, threshold 0.9", {**_RULE, "threshold": 0.9}, _GOSSIP),
    Setting("collaborative, soft", {**_RULE, "mode": "soft"}, _GOSSIP),
)

Result = tuple[Setting, Sequence[Sequence[Reply]]]
"""A setting, and for each question ``DRAWS`` replies."""


def markdown(questions: Sequence[Question], results: Sequence[Result]) -> str:
    """One row for each setting."""
    title = (
        f"| {len(questions)} questions × {DRAWS} | form | wrong facts | right facts (95 %) "
        f"| wordings of {DRAWS} | distinct-2 |"
    )
    lines = [title, "|---|---|---|---|---|---|"]
    for setting, replies in results:
        told = [
            [gossip.read(question, reply) for reply in drawn]
            for question, drawn in zip(questions, replies, strict=True)
        ]
        pairs = [(q, one) for q, drawn in zip(questions, told, strict=True) for one in drawn]
        form = share([one.form for _, one in pairs])
        wrong = share([one.form and one.value != q.value for q, one in pairs])
        right = [one.value == q.value for q, one in pairs]
        low, high = wilson(right)
        wordings = fmean(len({one.wording for one in drawn}) for drawn in told)
        distinct = gossip.distinct_bigrams([one.wording for _, one in pairs])
        lines.append(
            f"| {setting.label} | {_percent(form)} | {_percent(wrong)} "
            f"| {_percent(share(right))} ({_percent(low)} to {_percent(high)}) "
            f"| {wordings:.2f} | {distinct:.4f} |"
        )
    return "\n".join(lines)


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
