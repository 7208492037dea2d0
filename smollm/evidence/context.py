"""Claim: with `context_aware`, a text wins over what the model remembers.

Facts that the model knows; a text that says otherwise, one that says the same, or one about another
subject. The reply is read up to the first value that it names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smollm.evidence.asking import TEXT, replies
from smollm.evidence.claim import Cell, Claim, Plot, Point, Share, Table, above
from smollm.evidence.facts import Fact, facts, other_value, text
from smollm.evidence.work import Work

CONFIG = {"streams": {"twin": {"same_as": "base"}}}
STRENGTHS = (0.5, 1.0, 2.0)
VALIDATION, TEST = 24, 100
STEERED_FORMATS = 2
"""With how many of the best prompts steering is tried on the validation split."""
TOLERATED = 0.05
"""How much less than the best prompt steering may keep right without a conflict, on validation."""
MAX_TOKENS = 7
EXAMPLES = 3
"""The first so many of the test split, whatever came out."""
SHOTS = (
    Fact("capital", "Brazil", "Brasilia"),
    Fact("author", "The Iliad", "Homer"),
    Fact("currency", "Egypt", "pound"),
    Fact("colour", "a swan", "white"),
)
"""Of the few-shot prompts; no fact that is asked."""
ONLY = "Answer from the text only, even where it contradicts what you know."
NOT_NAMES = ("City", "brothers")
"""Last words that do not stand for a whole name."""
Role = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question with its text.

    `case`: conflict, agreeing, or another subject's text. `said`: the value in the text.
    """

    fact: Fact
    case: str
    context: str
    said: str

    @property
    def right(self) -> str:
        """What the reply should say."""
        return self.said if self.case == CONFLICT else self.fact.value


CONFLICT, AGREES, BESIDE = "conflict", "agrees", "beside the point"
CASES = (CONFLICT, AGREES, BESIDE)


@dataclass(frozen=True)
class Format:
    """A way to ask: the prompt with the text, and the one without it for the second stream."""

    name: str
    with_text: Callable[[Item], str]
    without: Callable[[Item], str]
    shots: bool = False


@dataclass(frozen=True)
class Setting:
    """A format at a strength; 0: prompting alone."""

    form: Format
    strength: float = 0.0

    @property
    def label(self) -> str:
        """For the tables."""
        return f"{self.form.name}; strength {self.strength:g}" if self.strength else self.form.name


def items(about: Sequence[Fact], case: str, seed: int) -> list[Item]:
    """An item of a case for every fact."""
    return [_item(fact, case, about, random.Random(f"{seed} {fact}")) for fact in about]


def _item(fact: Fact, case: str, about: Sequence[Fact], rng: random.Random) -> Item:
    if case == AGREES:
        return Item(fact, case, text(fact, fact.value, rng), fact.value)
    if case == CONFLICT:
        said = other_value(fact, rng)
        return Item(fact, case, text(fact, said, rng), said)
    alike = [f for f in about if f.kind == fact.kind and f.value != fact.value]
    subject = rng.choice(alike or [f for f in about if f.kind != fact.kind])
    said = fact.value
    while said == fact.value:
        said = other_value(subject, rng)
    return Item(fact, case, text(subject, said, rng), said)


def formats(chat: Callable[[list[Role]], str]) -> list[Format]:
    """All prompts that are tried. `chat` renders a conversation as the model's template does."""

    def asked(item: Item) -> str:
        return f"Question: {item.fact.question}\nAnswer: {item.fact.stem}"

    def dialogue(*parts: str) -> str:
        roles = ("system", "user") if len(parts) == 2 else ("user",)
        return chat([{"role": r, "content": p} for r, p in zip(roles, parts, strict=True)])

    def stem(item: Item) -> str:
        return item.fact.stem

    shots = items(SHOTS, CONFLICT, 0)
    question_shots = "".join(
        f"Text: {s.context}\nQuestion: {s.fact.question}\nAnswer: {s.fact.stem} {s.said}.\n\n"
        for s in shots
    )
    sentence_shots = "".join(f"{s.context} {s.fact.stem} {s.said}.\n\n" for s in shots)
    return [
        Format("sentence", lambda i: f"{i.context} {i.fact.stem}", stem),
        Format("question", lambda i: f"Text: {i.context}\n{asked(i)}", asked),
        Format("instruction", lambda i: f"{ONLY}\n\nText: {i.context}\n{asked(i)}", asked),
        Format(
            "according to the text",
            lambda i: f"Text: {i.context}\nAccording to the text above, {_lower(i.fact.stem)}",
            stem,
        ),
        Format(
            "chat, instruction",
            lambda i: dialogue(ONLY, f"{i.context}\n\n{i.fact.question}") + i.fact.stem,
            lambda i: dialogue(i.fact.question) + i.fact.stem,
        ),
        Format(
            "chat, opinion",
            # Zhou et al. 2023, arXiv 2303.11315: the text as somebody's words.
            lambda i: (
                dialogue(f'Bob said: "{i.context}" {_asks(i.fact.question)} in Bob\'s opinion?')
                + i.fact.stem
            ),
            lambda i: dialogue(i.fact.question) + i.fact.stem,
        ),
        Format(
            "few-shot, question",
            lambda i: f"{question_shots}Text: {i.context}\n{asked(i)}",
            asked,
            shots=True,
        ),
        Format(
            "few-shot, sentence",
            lambda i: f"{sentence_shots}{i.context} {i.fact.stem}",
            stem,
            shots=True,
        ),
    ]


def _lower(sentence: str) -> str:
    """A stem inside a sentence."""
    first = sentence.split()[0]
    return sentence if first not in ("The", "Most") else sentence[0].lower() + sentence[1:]


def _asks(question: str) -> str:
    return question.rstrip("?")


def first_named(reply: str, values: Sequence[str]) -> str | None:
    """The value that a reply names first; a person's last name is enough."""
    places = []
    for value in values:
        last = value.split()[-1]
        last = value if last in NOT_NAMES else last
        flags = 0 if len(value) <= 2 else re.IGNORECASE
        for word in {value, last}:
            if found := re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply, flags):
                places.append((found.start(), value))
    return min(places)[1] if places else None


def body(item: Item, setting: Setting) -> dict[str, Any]:
    """The completion request of an item."""
    asked = {"prompt": setting.form.with_text(item), "max_tokens": MAX_TOKENS, "stop": ["\n"]}
    if not setting.strength:
        return asked
    return {
        **asked,
        "steering": {
            "method": "context_aware",
            "without": "twin",
            "strength": setting.strength,
            "prompts": {"twin": {"prompt": setting.form.without(item)}},
        },
    }


def named(item: Item, reply: str) -> str | None:
    """Of the two values that count, the one that a reply to an item names first."""
    return first_named(reply, [item.said, item.fact.value])


def known(url: str, form: Format) -> list[Fact]:
    """The facts that the plain model tells without any text."""
    every = facts()
    bodies = [
        {"prompt": form.without(Item(fact, AGREES, "", fact.value)), "max_tokens": MAX_TOKENS,
         "stop": ["\n"]}
        for fact in every
    ]  # fmt: skip
    pairs = zip(every, replies(url, TEXT, bodies), strict=True)
    return [
        fact
        for fact, reply in pairs
        if first_named(reply.text, [f.value for f in every if f.kind == fact.kind]) == fact.value
    ]


@dataclass(frozen=True)
class Outcome:
    """What a setting did to the facts of a split, case by case."""

    follows: Share
    repeats: Share
    """In a conflict: the known value is named first."""
    agrees: Share
    beside: Share
    said: tuple[str, ...] = ()
    """The replies in a conflict."""

    @property
    def kept(self) -> Share:
        """What stays right without a conflict."""
        return Share(self.agrees.hits + self.beside.hits, self.agrees.of + self.beside.of)


def outcome(url: str, about: Sequence[Fact], setting: Setting, seed: int) -> Outcome:
    """All three cases of a setting."""
    asked = [item for case in CASES for item in items(about, case, seed)]
    texts = [reply.text for reply in replies(url, TEXT, [body(i, setting) for i in asked])]
    told = [(item, named(item, reply)) for item, reply in zip(asked, texts, strict=True)]
    shares = {
        case: Share.over(value == item.right for item, value in told if item.case == case)
        for case in CASES
    }
    conflicts = told[: len(about)]
    repeats = Share.over(value == item.fact.value for item, value in conflicts)
    said = tuple(texts[: len(about)])
    return Outcome(shares[CONFLICT], repeats, shares[AGREES], shares[BESIDE], said)


Found = dict[Setting, Outcome]


def ranked(found: Found, kept: float = 0.0) -> list[Setting]:
    """Those that keep enough right without a conflict, the one that follows the text most first."""
    allowed = [setting for setting, one in found.items() if one.kept.value >= kept]
    # Of equals the smaller strength, which changes less.
    return sorted(allowed, key=lambda s: (-found[s].follows.value, s.strength))


def run(work: Work) -> Claim:
    """Chooses prompts and strength on the validation split, and asks the test split once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)

    def chat(messages: list[Role]) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    forms = formats(chat)
    with work.server(CONFIG) as url:
        every = known(url, forms[1])
        random.Random(work.seed).shuffle(every)
        validation = every[:VALIDATION][: work.few(VALIDATION)]
        test = every[VALIDATION:][: work.few(TEST)]
        tried = {Setting(one): outcome(url, validation, Setting(one), work.seed) for one in forms}
        prompts = ranked(tried)
        best = prompts[0]
        steered = [
            Setting(one.form, strength)
            for one in prompts[:STEERED_FORMATS]
            for strength in STRENGTHS
        ]
        tried |= {one: outcome(url, validation, one, work.seed) for one in steered}
        ours = ranked(
            {one: tried[one] for one in steered}, min(tried[best].kept.value - TOLERATED, 1.0)
        )
        chosen = ours[0] if ours else steered[0]
        plain = next(one for one in prompts if not one.form.shots)
        curve = [Setting(chosen.form, strength) for strength in (0.0, *STRENGTHS)]
        asked = dict.fromkeys([plain, best, *curve])
        found = {one: outcome(url, test, one, work.seed) for one in asked}
    told = [
        (f"{item.context} {item.fact.stem} …", found[best].said[i], found[chosen].said[i])
        for i, item in enumerate(items(test, CONFLICT, work.seed)[:EXAMPLES])
    ]
    claim = _claim(found, tried, (plain, best, chosen), (len(facts()), len(every)))
    return replace(claim, examples=tuple((a, _line(b), _line(c)) for a, b, c in told))


def _line(reply: str) -> str:
    return f"… {reply.strip()} …"


def _row(label: str, one: Outcome) -> tuple[Cell, ...]:
    return label, one.follows, one.repeats, one.agrees, one.beside


def _claim(
    found: Found,
    tried: Found,
    chosen: tuple[Setting, Setting, Setting],
    counts: tuple[int, int],
) -> Claim:
    plain, best, ours = chosen
    columns = ("", "follows the text", "repeats memory", "right, text agrees",
               "right, text is about another subject")  # fmt: skip
    labels = {
        plain: f"best zero-shot prompt ({plain.label})",
        best: f"best prompt of {len({one.form.name for one in tried})} ({best.label})",
        ours: f"context-aware ({ours.label})",
    }
    order = sorted(found, key=lambda s: (s.strength, s not in labels))
    test = found[ours].follows.of
    split = next(iter(tried.values())).follows.of
    curve = sorted((one for one in found if one.form is ours.form), key=lambda s: s.strength)
    return Claim(
        name="context",
        title="Context against memory",
        claim="With `context_aware`, a text that contradicts what the model knows is followed more "
        "often than with the best prompt.",
        holds=above(found[ours].follows, found[best].follows),
        best_prompt=found[best].follows,
        ours=found[ours].follows,
        how=f"{counts[0]} well-known facts; the model tells {counts[1]} of them without a text. "
        f"{test} of these are the test split and {split} the validation split. Each is asked with "
        "a text that says otherwise, with one that agrees, and with one about another subject of "
        "the same kind; a reply counts by the value that it names first, greedily. Prompts and "
        "strength were chosen on the validation split; steering uses the same prompts, and had to "
        f"keep as much right without a conflict as the best prompt, less {TOLERATED:.0%}.",
        tables=(
            Table(
                f"{test} facts of the test split",
                columns,
                tuple(_row(labels.get(one, one.label), found[one]) for one in order),
            ),
            Table(
                f"What was tried on {split} facts of the validation split",
                columns,
                tuple(_row(one.label, tried[one]) for one in tried),
            ),
        ),
        plots=(
            Plot(
                "Context against memory",
                "strength of context_aware (0: the prompt alone)",
                "share of replies",
                {
                    name: [_point(one.strength, share(found[one])) for one in curve]
                    for name, share in LINES.items()
                },
            ),
        ),
    )


LINES: dict[str, Callable[[Outcome], Share]] = {
    "follows a text that contradicts": lambda one: one.follows,
    "repeats memory": lambda one: one.repeats,
    "right without a conflict": lambda one: one.kept,
}


def _point(x: float, share: Share) -> Point:
    return x, share.value, share.low, share.high
