"""Claim: with `guidance`, the model does what it is told more often.

The base reads the task with an instruction that a program can check, the second stream the same
prompt without it; γ counts what the instruction changes more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from smollm.evidence.asking import CHAT, Reply, distinct, log_probs, perplexity, replies
from smollm.evidence.claim import Cell, Claim, Plot, Point, Share, Table, above
from smollm.evidence.orders import KINDS, SHOTS, Order, orders
from smollm.evidence.work import Work

CONFIG = {"streams": {"twin": {"same_as": "base"}}}
STRENGTHS = (1.5, 2.0, 3.0)
VALIDATION, TEST = 48, 160
STEERED_FORMATS = 2
MAX_TOKENS = 64
FLUENCY = 64
"""Of how many replies the perplexity is measured."""
EXAMPLES = 4
"""The first so many of the test split, whatever came out."""
Messages = list[dict[str, str]]
OTHER = ("lower case", "bullet points", "ends with")
"""The kinds whose examples the few-shot prompt has, whatever is asked."""


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _asked(order: Order, told: bool) -> str:
    return f"{order.task} {order.instruction}" if told else order.task


def _shots(kinds: Sequence[str], told: bool) -> Messages:
    found: Messages = []
    for kind in kinds:
        asked, reply = SHOTS[kind]
        # The task is the first sentence, the instruction what follows.
        asked = asked if told else asked.partition(". ")[0] + "."
        found += [*_user(asked), {"role": "assistant", "content": reply}]
    return found


def _plain(order: Order, told: bool) -> Messages:
    return _user(_asked(order, told))


def _twice(order: Order, told: bool) -> Messages:
    again = f"\n\nRemember: {order.instruction}" if told else ""
    return _user(_asked(order, told) + again)


def _appeal(order: Order, told: bool) -> Messages:
    system = [{"role": "system", "content": "You follow every instruction to the letter."}]
    return [*system, *_plain(order, True)] if told else _plain(order, False)


def _few(order: Order, told: bool) -> Messages:
    return [*_shots(OTHER, told), *_plain(order, told)]


def _same(order: Order, told: bool) -> Messages:
    return [*_shots([order.kind], told), *_plain(order, told)]


FORMATS: dict[str, Callable[[Order, bool], Messages]] = {
    "after the task": _plain,
    "twice": _twice,
    "with an appeal": _appeal,
    "few-shot, three kinds": _few,
    "few-shot, the same kind": _same,
}
"""How an instruction is put, zero-shot and few-shot; False: the same prompt without it."""
PLAIN = "after the task"


@dataclass(frozen=True)
class Setting:
    """A format at a strength; 1: prompting alone."""

    form: str
    strength: float = 1.0

    @property
    def label(self) -> str:
        """For the tables."""
        return self.form if self.strength == 1 else f"{self.form}; guidance, γ {self.strength:g}"


def body(order: Order, setting: Setting) -> dict[str, Any]:
    """The chat request of an instruction."""
    asked = {"messages": FORMATS[setting.form](order, True), "max_tokens": MAX_TOKENS}
    if setting.strength == 1:
        return asked
    return {
        **asked,
        "steering": {
            "method": "guidance",
            "negative": "twin",
            "strength": setting.strength,
            "prompts": {"twin": {"messages": FORMATS[setting.form](order, False)}},
            "report": True,
        },
    }


def answers(url: str, asked: Sequence[Order], setting: Setting) -> list[Reply]:
    """The replies to all instructions."""
    return replies(url, CHAT, [body(order, setting) for order in asked])


def marks(asked: Sequence[Order], said: Sequence[Reply]) -> list[bool]:
    """Which replies obey."""
    return [o.obeyed(r.text, r.ended) for o, r in zip(asked, said, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """What a setting did with the instructions of a split."""

    right: tuple[bool, ...]
    said: tuple[Reply, ...]
    perplexity: float = 0.0
    """Of the replies to the plain base, asked in the plain format; 0: not measured."""

    @property
    def obeyed(self) -> Share:
        """The share of replies that obey."""
        return Share.over(self.right)

    def of_kind(self, asked: Sequence[Order], kind: str) -> Share:
        """The share of one kind of instructions."""
        return Share.over(r for o, r in zip(asked, self.right, strict=True) if o.kind == kind)


def outcome(url: str, asked: Sequence[Order], setting: Setting) -> Outcome:
    """Asks all, and checks."""
    said = answers(url, asked, setting)
    return Outcome(tuple(marks(asked, said)), tuple(said))


Found = dict[Setting, Outcome]


def ranked(found: Found) -> list[Setting]:
    """The one that is obeyed most often first; of equals the smaller strength."""
    return sorted(found, key=lambda s: (-found[s].obeyed.value, s.strength))


def run(work: Work) -> Claim:
    """Chooses format and strength on the validation split, and asks the test split once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    validation = orders(work.few(VALIDATION, len(KINDS)), f"second validation {work.seed}")
    test = orders(work.few(TEST, len(KINDS)), f"second test {work.seed}")
    plain_prompts = [
        tokenizer.apply_chat_template(
            FORMATS[PLAIN](order, True), add_generation_prompt=True, return_dict=False
        )
        for order in test[:FLUENCY]
    ]

    def with_fluency(url: str, one: Outcome) -> Outcome:
        found = log_probs(url, plain_prompts, [reply.ids for reply in one.said[:FLUENCY]])
        return Outcome(one.right, one.said, perplexity(found))

    with work.server(CONFIG) as url:
        tried = {Setting(form): outcome(url, validation, Setting(form)) for form in FORMATS}
        prompts = ranked(tried)
        steered = [
            Setting(one.form, strength)
            for one in prompts[:STEERED_FORMATS]
            for strength in STRENGTHS
        ]
        tried |= {one: outcome(url, validation, one) for one in steered}
        ours = ranked({one: tried[one] for one in steered})[0]
        curve = [Setting(ours.form, strength) for strength in (1.0, *STRENGTHS)]
        asked = dict.fromkeys([Setting(PLAIN), prompts[0], *curve])
        found = {one: with_fluency(url, outcome(url, test, one)) for one in asked}
    return _claim(test, found, tried, prompts[0], ours)


def _row(label: str, one: Outcome) -> tuple[Cell, ...]:
    texts = [reply.text for reply in one.said]
    return (
        label,
        one.obeyed,
        one.perplexity,
        distinct(texts, 2),
        fmean(len(reply.ids) for reply in one.said),
        fmean(reply.kl for reply in one.said),
    )


def _claim(
    test: Sequence[Order], found: Found, tried: Found, best: Setting, ours: Setting
) -> Claim:
    plain = Setting(PLAIN)
    labels = {
        plain: f"plain prompt ({plain.label})",
        best: f"best prompt of {len(FORMATS)} ({best.label})",
        ours: f"guidance ({ours.label})",
    }
    order = sorted(found, key=lambda s: (s.strength, s not in labels))
    curve = sorted((one for one in found if one.form == ours.form), key=lambda s: s.strength)
    split = len(next(iter(tried.values())).right)
    three = list(dict.fromkeys((plain, best, ours)))
    per_kind = [(kind, *(_of(found[one].of_kind(test, kind)) for one in three)) for kind in KINDS]
    return Claim(
        name="instructions",
        title="Instructions",
        claim="With `guidance` away from the same prompt without its instruction, the model obeys "
        "instructions more often than with the best prompt.",
        holds=above(found[ours].obeyed, found[best].obeyed),
        best_prompt=found[best].obeyed,
        ours=found[ours].obeyed,
        how=f"{len(KINDS)} kinds of instructions that a program checks, in the manner of "
        f"[IFEval](https://arxiv.org/abs/2311.07911); {len(test)} on the test split, {split} "
        f"on the validation split, greedy, at most {MAX_TOKENS} tokens. A reply must also name "
        "its topic and not copy an example: in a first run, on other questions, the best prompt "
        "copied its example word for word, which obeys. The second stream reads the same prompt "
        f"without the instruction. Guidance was tried on the {STEERED_FORMATS} prompts that were "
        f"best on the validation split. Perplexity is that of {FLUENCY} replies to the plain base "
        "which reads the plain prompt; KL is per token, from the base that reads the same prompt.",
        tables=(
            Table(
                f"{len(test)} instructions of the test split",
                ("", "obeyed", "perplexity", "distinct-2", "tokens", "KL (nats)"),
                tuple(_row(labels.get(one, one.label), found[one]) for one in order),
            ),
            Table(
                "By kind of instruction",
                ("", *(labels[one].partition(" (")[0] for one in three)),
                tuple(per_kind),
            ),
            Table(
                f"What was tried on {split} instructions of the validation split",
                ("", "obeyed"),
                tuple((one.label, tried[one].obeyed) for one in tried),
            ),
        ),
        plots=(
            Plot(
                "Instructions",
                "strength γ of guidance (1: the prompt alone)",
                "share obeyed",
                {f"guidance, {ours.form}": [_point(one.strength, found[one]) for one in curve]}
                | {"plain prompt": [_point(1.0, found[plain])]},
            ),
        ),
        examples=tuple(
            (
                f"{one.task} {one.instruction}",
                _line(found[plain].said[i].text),
                _line(found[ours].said[i].text),
            )
            for i, one in list(enumerate(test))[:EXAMPLES]
        ),
    )


def _of(share: Share) -> str:
    return f"{share.hits} of {share.of}"


def _line(text: str) -> str:
    return text.strip().replace("\n", " ⏎ ").replace("```", "~~~")


def _point(x: float, one: Outcome) -> Point:
    return x, one.obeyed.value, one.obeyed.low, one.obeyed.high
