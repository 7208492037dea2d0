"""A fine-tune with a dial: the twin with a LoRA is the expert, at strengths below and above 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from smollm.evidence.asking import Reply, distinct, log_probs
from smollm.evidence.claim import Cell, Claim, Mean, Plot, Point, Share, Table, above
from smollm.evidence.prompting import Wanted, best_prompt, plainly, prompted
from smollm.evidence.purposes import (
    LETTER,
    PROMPTS,
    TELEGRAM,
    Item,
    Prompt,
    Split,
    body_of,
    dropped_share,
    first_sentences,
    is_letter,
    is_telegram,
    letter,
    telegraph,
)
from smollm.evidence.trained import made
from smollm.evidence.work import Work

STRENGTHS = (0.5, 1.0, 1.5, 2.0)
MIXES = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (1.5, 1.5))
"""Weights of telegram and letter."""
VALIDATION, TEST, TEST_MIX = 16, 40, 24
FLUENT = 16
"""Replies whose perplexity is measured."""
EXPERT, SECOND = "expert", "second"
"""Twins of the base, one with each adapter."""


def run(work: Work) -> Claim:
    """Measures the claim."""
    folder, splits = made(work, (TELEGRAM, LETTER))
    with work.server(config(folder)) as url:
        return _Dial(work, url, splits).claim()


def config(folder: Path) -> dict[str, Any]:
    """Of the server: the telegram on the base and on one twin, the letter on another.

    Args:
        folder: with the adapters.
    """
    sources = {
        "telegram": ("base", TELEGRAM),
        "letter": ("base", LETTER),
        "telegram-expert": (EXPERT, TELEGRAM),
        "letter-expert": (SECOND, LETTER),
    }
    return {
        "streams": {EXPERT: {"same_as": "base"}, SECOND: {"same_as": "base"}},
        "adapters": {
            "roots": [str(folder.resolve())],
            "preload": [
                {"name": name, "source": str((folder / purpose.name).resolve()), "stream": stream}
                for name, (stream, purpose) in sources.items()
            ],
            "max_loaded": 8,
            "max_rank": 16,
        },
        # Nothing to compile for three streams, and two cores gain little from it.
        "engine": {"enforce_eager": True},
    }


def dialled(strength: float) -> dict[str, Any]:
    """The part of a request that turns the telegram's dial: what tuning changed, times so much."""
    steering = {"method": "proxy_tuning", "expert": EXPERT, "anti_expert": "base"}
    return {
        "adapters": [{"name": "telegram-expert"}],
        "steering": {**steering, "strength": strength, "report": True},
    }


def weighted(weight: float) -> dict[str, Any]:
    """The part of a request that puts the telegram's adapter on the base at a weight."""
    return {"adapters": [{"name": "telegram", "weight": weight}]}


def mixed(telegram: float, letters: float) -> dict[str, Any]:
    """The part of a request that adds both experts' changes."""
    rewards = [{"tuned": EXPERT, "weight": telegram}, {"tuned": SECOND, "weight": letters}]
    return {
        "adapters": [{"name": "telegram-expert"}, {"name": "letter-expert"}],
        "steering": {
            "method": "emulated_fine_tuning",
            "reference": "base",
            "rewards": [one for one in rewards if one["weight"]],
        },
    }


def mixed_weights(telegram: float, letters: float) -> dict[str, Any]:
    """The part of a request that puts both adapters on the base."""
    both = (("telegram", telegram), ("letter", letters))
    return {"adapters": [{"name": name, "weight": weight} for name, weight in both]}


def is_both(text: str) -> bool:
    """Whether a text is a letter and what it says is a telegram."""
    body = body_of(text)
    return body is not None and is_telegram(body)


@dataclass(frozen=True)
class _Dial:
    """The measurements.

    Args:
        work: see there.
        url: of the server.
        splits: items by purpose.
    """

    work: Work
    url: str
    splits: dict[str, Split]

    def claim(self) -> Claim:
        chosen, tried = best_prompt(self.url, self.wanted, self.validation)
        strengths = [(s, self._share(plainly(self.url, self.validation, **dialled(s))))
                     for s in STRENGTHS]  # fmt: skip
        strength, _ = max(strengths, key=lambda one: one[1].value)
        before = plainly(self.url, self.test)
        ways = {s: plainly(self.url, self.test, **dialled(s)) for s in STRENGTHS}
        weights = {w: plainly(self.url, self.test, **weighted(w)) for w in STRENGTHS}
        by_prompt = self._by_prompt(chosen)
        best, ours = self._share(by_prompt[chosen.name]), self._share(ways[strength])
        rows = [self._row("the base, asked plainly", before)]
        rows += [self._row(f"prompt: {name}", found) for name, found in by_prompt.items()]
        rows += [self._row(f"strength {s:g}", found) for s, found in ways.items()]
        rows += [self._row(f"the adapter itself at weight {w:g}", f) for w, f in weights.items()]
        rows.append(self._rewritten(before))
        return Claim(
            name="dial",
            title="A dial for a fine-tune",
            claim="A LoRA on a twin of the base, as the expert of `proxy_tuning`, gives a style "
            "that no prompt gives, as much of it as a request asks for.",
            holds=above(ours, best),
            best_prompt=best,
            ours=ours,
            how=self._how(),
            tables=(
                _style(rows, strength),
                tried,
                Table(
                    "Strengths, on the validation split",
                    ("strength", "telegrams"),
                    tuple(strengths),
                    f"Chosen: {strength:g}.",
                ),
                self._mixes(),
            ),
            plots=(
                Plot(
                    "Replies in the style against its strength",
                    "strength, or weight of the adapter",
                    "share of replies that are telegrams",
                    {
                        "added to the scores (proxy_tuning)": self._line(before, ways),
                        "the adapter at a weight": self._line(before, weights),
                        f"best prompt ({chosen.name})": [_point(0.0, best), _point(2.0, best)],
                    },
                ),
            ),
            examples=tuple(
                (item.question, a.text, b.text)
                for item, a, b in list(zip(self.test, before, ways[strength], strict=True))[:3]
            ),
        )

    @property
    def validation(self) -> tuple[Item, ...]:
        return self.splits[TELEGRAM.name].validation[: self.work.few(VALIDATION)]

    @property
    def test(self) -> tuple[Item, ...]:
        return self.splits[TELEGRAM.name].test[: self.work.few(TEST)]

    @cached_property
    def wanted(self) -> Wanted:
        return Wanted.of(TELEGRAM, self.splits[TELEGRAM.name].train)

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.work.model)

    def _how(self) -> str:
        count = len(self.splits[TELEGRAM.name].train)
        return (
            f"A PEFT LoRA (rank 8) learns from {count} of the base's own one-sentence answers, "
            "rewritten in code: no articles, no forms of `to be`, STOP for a full stop. A reply "
            "counts if all of it is so and it ended. Things asked about in training are not asked "
            "about again. `strength` s gives `z = z_base + s (z_tuned - z_base)`: 0 is the base, "
            "1 the fine-tune, more was never trained. Perplexity is the plain base's, of the "
            "reply after the question; the style itself costs what the last row says. Repeated: "
            "pairs of words of one reply that it has had before."
        )

    def _by_prompt(self, chosen: Prompt) -> dict[str, list[Reply]]:
        """Replies of the first zero-shot and few-shot prompts, and of the one that was chosen."""
        few = next(p for p in PROMPTS if p.shots)
        ways = {p.name: p for p in (PROMPTS[0], few, chosen)}
        return {
            name: prompted(self.url, prompt, self.wanted, self.test)
            for name, prompt in ways.items()
        }

    def _share(self, found: Sequence[Reply]) -> Share:
        return Share.over(is_telegram(reply.text) for reply in found)

    def _line(self, before: Sequence[Reply], found: dict[float, list[Reply]]) -> list[Point]:
        return [_point(at, self._share(some)) for at, some in {0.0: before, **found}.items()]

    def _row(self, name: str, found: Sequence[Reply]) -> tuple[Cell, ...]:
        kl = Mean.over([reply.kl for reply in found]) if any(r.kl for r in found) else ""
        texts = [reply.text for reply in found]
        return (name, self._share(found), *self._fluency(texts), kl)

    def _fluency(self, texts: Sequence[str]) -> tuple[Cell, ...]:
        """Words that a telegram leaves out, perplexity, repeated pairs of words."""
        asked = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": item.question}],
                add_generation_prompt=True, return_dict=False,
            )
            for item in self.test[:FLUENT]
        ]  # fmt: skip
        ids = [
            self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[:FLUENT]
        ]
        surprise = [-sum(one) / len(one) for one in log_probs(self.url, asked, ids) if one]
        repeated = [1 - distinct([text], 2) for text in texts if len(text.split()) > 1]
        return (
            Mean.over([100 * dropped_share(text) for text in texts]),
            _exp(Mean.over(surprise)),
            Mean.over([100 * one for one in repeated]),
        )

    def _rewritten(self, before: Sequence[Reply]) -> tuple[Cell, ...]:
        texts = [telegraph(first_sentences(r.text) or r.text) for r in before]
        share = Share.over(map(is_telegram, texts))
        return ("the base's own replies, rewritten in code", share, *self._fluency(texts), "")

    def _mixes(self) -> Table:
        """Both styles at once, by weights and by prompts."""
        split = self.splits[LETTER.name]
        items = split.test[: self.work.few(TEST_MIX)]
        validation = split.validation[: self.work.few(VALIDATION)]
        shots = tuple((item.question, letter(telegraph(item.answer))) for item in split.train[::5])
        both = Wanted("both", (TELEGRAM, LETTER), shots, lambda text, _: is_both(text))
        prompt, _ = best_prompt(self.url, both, validation)
        rows = [
            ("the base, asked plainly", plainly(self.url, items)),
            (f"best prompt for both: {prompt.name}", prompted(self.url, prompt, both, items)),
        ]
        for name, way in (("added to the scores", mixed), ("adapters", mixed_weights)):
            rows += [
                (f"{name}: telegram {a:g}, letter {b:g}", plainly(self.url, items, **way(a, b)))
                for a, b in MIXES
                if way is mixed or (a and b)
            ]
        return Table(
            "Two styles at once, on questions that only the letter's adapter has learned from",
            ("way", "telegram", "letter", "both"),
            tuple(
                (
                    name,
                    *(
                        Share.over(right(reply.text) for reply in found)
                        for right in (_says_telegram, is_letter, is_both)
                    ),
                )
                for name, found in rows
            ),
            "No adapter has seen a letter whose body is a telegram. The prompts were given both "
            "instructions, and examples of both at once.",
        )


def _says_telegram(text: str) -> bool:
    """Whether a text, or what a letter says, is a telegram."""
    return is_telegram(body_of(text) or text)


def _style(rows: Sequence[tuple[Cell, ...]], strength: float) -> Table:
    return Table(
        "Telegrams, on the test split",
        (
            "way",
            "telegrams",
            "words that a telegram leaves out, %",
            "perplexity",
            "repeated pairs, %",
            "KL from the base, nats a token",
        ),
        tuple(rows),
        f"Strength {strength:g} was chosen on the validation split.",
    )


def _point(x: float, share: Share) -> Point:
    return x, share.value, share.low, share.high


def _exp(mean: Mean) -> Mean:
    """Of a mean surprise the perplexity."""
    return Mean(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.of)
