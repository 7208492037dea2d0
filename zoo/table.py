"""The rows of the evaluation table and its markdown. Pure Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.score import gap_closed, mark, share, style, wilson
from zoo.world import Question


@dataclass(frozen=True)
class Reply:
    """A model's answer; ``ended`` tells whether it ended by itself."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Row:
    """One setting to measure.

    ``steering`` is the request's steering field, ``weights`` the same sum written out over the
    streams of ``server.yaml``.
    """

    label: str
    weights: dict[str, float]
    steering: dict[str, Any]
    temperature: float = 0.0
    max_tokens: int = 24
    mix: bool = False
    """Whether the row is about styles rather than about the gap."""


def _alone(label: str, stream: str) -> Row:
    weights = {"base": 0.0, stream: 1.0} if stream != "base" else {"base": 1.0}
    return Row(label, weights, {"method": "mix", "weights": weights})


def _proxy(strength: float) -> Row:
    return Row(
        f"proxy-tuning, strength {strength:g}",
        {"base": 1.0, "chat": strength, "plain": -strength},
        {
            "method": "proxy_tuning",
            "expert": "chat",
            "anti_expert": "plain",
            "strength": strength,
        },
    )


def _emulated(strength: float) -> Row:
    return Row(
        f"emulated fine-tuning, strength {strength:g}",
        {"base": strength, "chat": 1.0, "plain": -strength},
        {
            "method": "emulated_fine_tuning",
            "tuned": "chat",
            "reference": "plain",
            "strength": strength,
        },
    )


def _styles(formal: float, direct: float) -> Row:
    return Row(
        f"reward mix, formal {formal:g} + direct {direct:g}",
        {"base": 1.0, "formal": formal, "direct": direct, "plain": -formal - direct},
        {
            "method": "emulated_fine_tuning",
            "rewards": [
                {"tuned": "formal", "weight": formal},
                {"tuned": "direct", "weight": direct},
            ],
            "reference": "plain",
        },
        temperature=STYLE_TEMPERATURE,
        mix=True,
    )


STYLE_TEMPERATURE = 0.7

BASE = _alone("base alone (base-large)", "base")
CEILING = _alone("directly tuned (chat-large), the ceiling", "ceiling")
ROWS = (
    BASE,
    CEILING,
    _proxy(1.0),
    _proxy(0.75),
    _proxy(1.25),
    _alone("small tuned model alone (chat-small)", "chat"),
    _emulated(0.0),
    _emulated(0.5),
    _emulated(1.0),
    _emulated(1.5),
    _styles(1, 0),
    _styles(0.75, 0.25),
    _styles(0.5, 0.5),
    _styles(0.25, 0.75),
    _styles(0, 1),
)


def markdown(results: Sequence[tuple[Row, Sequence[Reply]]], questions: Sequence[Question]) -> str:
    """Two tables: the strict score with its gap, and the styles of the reward mix."""
    gap = [(row, replies) for row, replies in results if not row.mix]
    mix = [(row, replies) for row, replies in results if row.mix]
    lines = _gap_table(gap, questions)
    if mix:
        lines += ["", *_style_table(mix, questions)]
    return "\n".join(lines)


def _strict(replies: Sequence[Reply], questions: Sequence[Question]) -> list[bool]:
    pairs = zip(questions, replies, strict=True)
    return [mark(question, reply.text, reply.ended).strict for question, reply in pairs]


def _facts(replies: Sequence[Reply], questions: Sequence[Question]) -> list[bool]:
    pairs = zip(questions, replies, strict=True)
    return [mark(question, reply.text, reply.ended).fact for question, reply in pairs]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _gap_table(
    results: Sequence[tuple[Row, Sequence[Reply]]], questions: Sequence[Question]
) -> list[str]:
    hits = {row.label: _strict(replies, questions) for row, replies in results}
    base, ceiling = (share(hits[row.label]) for row in (BASE, CEILING))
    lines = [
        f"| {len(questions)} questions | score | 95 % interval | gap closed | fact named |",
        "|---|---|---|---|---|",
    ]
    for row, replies in results:
        score = share(hits[row.label])
        low, high = wilson(hits[row.label])
        closed = _percent(gap_closed(score, base, ceiling))
        named = _percent(share(_facts(replies, questions)))
        span = f"{_percent(low)} to {_percent(high)}"
        lines.append(f"| {row.label} | {_percent(score)} | {span} | {closed} | {named} |")
    return lines


def _style_table(
    results: Sequence[tuple[Row, Sequence[Reply]]], questions: Sequence[Question]
) -> list[str]:
    lines = [
        f"| {len(questions)} questions | formal | direct | other | fact named |",
        "|---|---|---|---|---|",
    ]
    for row, replies in results:
        found = [style(q, reply.text) for q, reply in zip(questions, replies, strict=True)]
        shares = [_percent(found.count(s) / len(found)) for s in ("formal", "direct", "other")]
        named = _percent(share(_facts(replies, questions)))
        lines.append(f"| {row.label} | {' | '.join(shares)} | {named} |")
    return lines
