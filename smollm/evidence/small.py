"""Claim: a small tuned companion steers the base to what no prompt gets it to do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smollm.evidence import desk
from smollm.evidence.asking import CHAT, ask, replies
from smollm.evidence.claim import Cell, Claim, Plot, Point, Share, Table, above
from smollm.evidence.desk import Judged, Question, judge
from smollm.evidence.small_models import Made, make
from smollm.evidence.work import Work

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
MIXES = (0.25, 0.5, 1.0, 2.0)
TOKENS = 40
SPEED_TOKENS = 64
PARTS = ("code", "sign_off", "answer", "whole")
COLUMNS = ("reply by", "code", "sign-off", "answer", "all three")

Asked = tuple[list[Question], list[str], list[Judged]]


@dataclass(frozen=True)
class Desk:
    """Asks a server the desk's questions."""

    url: str
    items: list[Question]

    def by_prompt(self, name: str) -> Asked:
        """The base's replies with one of the prompts."""
        rules, shots = desk.prompts()[name]
        return self._asked([{"messages": desk.messages(rules, shots, q)} for q in self.items])

    def plainly(self, **extra: Any) -> Asked:
        """Replies to nothing but the question, with these fields in the request."""
        return self._asked([{"messages": desk.messages("", [], q), **extra} for q in self.items])

    def _asked(self, bodies: Sequence[Mapping[str, Any]]) -> Asked:
        found = replies(self.url, CHAT, [{"max_tokens": TOKENS, **body} for body in bodies])
        texts = [one.text.strip() for one in found]
        return self.items, texts, [judge(q, t) for q, t in zip(self.items, texts, strict=True)]


def steered(strength: float) -> dict[str, Any]:
    """Proxy-tuning by the companion, before and after it was tuned."""
    method = {"method": "proxy_tuning", "expert": "tuned", "anti_expert": "companion"}
    return {"steering": {**method, "strength": strength}}


def mixed(weight: float) -> dict[str, Any]:
    """The tuned companion's scores added, nothing subtracted."""
    return {"steering": {"method": "mix", "weights": {"base": 1.0, "tuned": weight}}}


ALONE = {"steering": {"method": "mix", "weights": {"tuned": 1.0}}}
DIRECT = {"adapters": [{"name": "direct"}]}


def share(asked: Asked, part: str = "whole") -> Share:
    """How many replies are right in one respect."""
    return Share.over(getattr(one, part) for one in asked[2])


def row(name: str, asked: Asked) -> tuple[Cell, ...]:
    """A table's row: the name, and the shares that are right."""
    return name, *(share(asked, part) for part in PARTS)


def best(found: Mapping[Any, Asked]) -> Any:
    """The first of those with most replies right in all respects."""
    return max(found, key=lambda key: share(found[key]).hits)


def run(work: Work) -> Claim:
    """Makes the models, unless they are there, and measures."""
    made = make(work)
    streams = {
        name: {"model": str(folder.resolve())}
        for name, folder in (("tuned", made.tuned), ("companion", made.companion))
    }
    adapters = {
        "roots": [str(made.direct.parent.resolve())],
        "preload": [{"name": "direct", "source": str(made.direct.resolve())}],
        "max_loaded": 1,
        "max_rank": 8,
    }
    config = {"streams": streams, "adapters": adapters, "engine": {"max_model_len": 2048}}
    with work.server(config) as url:
        return measured(url, work, made)


def measured(url: str, work: Work, made: Made) -> Claim:
    """What a server with the models answers: validation chooses, the test split is asked once."""
    tried = Desk(url, desk.questions("validation", 1, work.seed)[: work.few(54)])
    prompts = {name: tried.by_prompt(name) for name in desk.prompts()}
    strengths = {value: tried.plainly(**steered(value)) for value in STRENGTHS}
    mixes = {value: tried.plainly(**mixed(value)) for value in MIXES}
    prompt, strength, weight = best(prompts), best(strengths), best(mixes)
    final = Desk(url, desk.questions("test", 1, work.seed)[: work.few(120)])
    plain, prompted = final.plainly(), final.by_prompt(prompt)
    ours, alone = final.plainly(**steered(strength)), final.plainly(**ALONE)
    added = final.plainly(**mixed(weight))
    rows = (
        row("the base, asked plainly", plain),
        row(f"the base, best prompt ({prompt})", prompted),
        row("the tuned companion alone (floor)", alone),
        row(f"tuned companion added, nothing subtracted (weight {weight:g})", added),
        row(f"**proxy-tuning, strength {strength:g}**", ours),
        row("the base tuned directly, LoRA (ceiling)", final.plainly(**DIRECT)),
    )
    validation = (
        *(row(name, asked) for name, asked in prompts.items()),
        *(row(f"proxy-tuning, strength {v:g}", asked) for v, asked in strengths.items()),
        *(row(f"added, weight {v:g}", asked) for v, asked in mixes.items()),
    )
    return Claim(
        name="small",
        title="Small steers large",
        claim=(
            f"A companion with {made.millions('companion'):.0f} million parameters, distilled from "
            f"the base ({made.millions('base'):.0f} million) and tuned to a convention, makes the "
            "base keep to it (`proxy_tuning`), better than the best prompt does."
        ),
        holds=above(share(ours), share(prompted)),
        best_prompt=share(prompted),
        ours=share(ours),
        how=HOW.format(tuning=made.lessons, test=len(final.items), tried=len(tried.items)),
        tables=(
            Table("Replies to the test questions that are right", COLUMNS, rows, _note(made)),
            Table("On the validation questions", COLUMNS, validation),
            cost(url, work, made, strength),
        ),
        plots=(curve(strengths),),
        examples=tuple(
            (question.text, before, after)
            for question, before, after in list(zip(ours[0], prompted[1], ours[1], strict=True))[:3]
        ),
    )


HOW = """\
The convention is a made-up help desk's. A reply is `[code] sentence // sign-off`; the code stands
for the topic of the question (six topics), the sign-off for its manner (plain, polite or hurried).
Both are arbitrary. The companion is tuned on {tuning} replies about other facts than are asked for
here: on code, first words and sign-off, while on the rest of the sentence it has to stay as it was.
So it knows the convention and hardly a fact. {tried} validation questions choose the prompt, the
strength and the weight; {test} test questions are then asked once. All greedy. A reply counts if
code, sign-off and the fact are right and it has nothing else. In the examples, `plain` is the base
with the best prompt."""


def _note(made: Made) -> str:
    return (
        "Where a program can tell the kind of a question, it can put code and sign-off itself; "
        "steering is worth it for what only examples define. "
        f"The companion's text: {made.tokens:,} tokens that the base wrote."
    )


def curve(found: Mapping[float, Asked]) -> Plot:
    """What is right, against the strength."""
    lines: dict[str, list[Point]] = {}
    for part, name in (("whole", "all three"), ("code", "code"), ("sign_off", "sign-off"),
                       ("answer", "answer")):  # fmt: skip
        shares = {value: share(asked, part) for value, asked in found.items()}
        lines[name] = [(value, s.value, s.low, s.high) for value, s in shares.items()]
    return Plot("Proxy-tuning by a small companion", "strength", "share of replies", lines)


def cost(url: str, work: Work, made: Made, strength: float) -> Table:
    """Parameters, operations and time of a token."""
    base, small = made.parameters["base"], made.parameters["companion"]
    plain, both = (_ms(url, work, extra) for extra in ({}, steered(strength)))
    return Table(
        "What a token costs",
        ("", "parameters read, millions", "GFLOP", "ms, one request alone"),
        (
            ("the base", base / 1e6, 2 * base / 1e9, plain),
            ("one companion", small / 1e6, 2 * small / 1e9, ""),
            ("proxy-tuning", (base + 2 * small) / 1e6, 2 * (base + 2 * small) / 1e9, both),
        ),
        "GFLOP: 2 for each parameter, without attention's own products.",
    )


def _ms(url: str, work: Work, extra: Mapping[str, Any]) -> float:
    """The median time of a token over a few requests, one at a time; the prompt's included."""
    asked = {"messages": [{"role": "user", "content": "Tell me about the sea."}]}
    body = {**asked, "max_tokens": SPEED_TOKENS, "ignore_eos": True, "temperature": 0, **extra}
    found = []
    for _ in range(work.few(5, quick=1)):
        start = time.monotonic()
        ask(url, CHAT, [body])
        found.append(1000 * (time.monotonic() - start) / SPEED_TOKENS)
    return statistics.median(found)
