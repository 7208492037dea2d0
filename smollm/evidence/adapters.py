"""Three LoRAs with different purposes, and the pack that chooses among them by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smollm.evidence.asking import CHAT, Reply, ask, reply_of
from smollm.evidence.claim import Cell, Claim, Share, Table, above
from smollm.evidence.exact import base_model, errors, peft_model, routed_model
from smollm.evidence.prompting import LONGEST, Wanted, best_prompt, plainly, prompted
from smollm.evidence.purposes import PURPOSES, Item, Prompt, Purpose, Split
from smollm.evidence.trained import PACK, made, train_pack
from smollm.evidence.work import Work

VALIDATION, TEST, EXACT = 16, 32, 2
PACK_STEPS = 30
MIX = {"telegram": 0.7, "letter": 0.5}
"""Weights of a mix, whose exactness is measured."""


def run(work: Work) -> Claim:
    """Measures the claim."""
    folder, splits = made(work, PURPOSES)
    train_pack(work.model, PURPOSES, folder, PACK_STEPS)
    with work.server(config(folder)) as url:
        return _Adapters(work, url, folder, splits).claim()


def config(folder: Path) -> dict[str, Any]:
    """Of the server: the three adapters and the pack, on the base.

    Args:
        folder: with the adapters.
    """
    names = [*(purpose.name for purpose in PURPOSES), PACK]
    return {
        "adapters": {
            "roots": [str(folder.resolve())],
            "preload": [{"name": n, "source": str((folder / n).resolve())} for n in names],
            "max_loaded": 8,
            "max_rank": 32,
        },
        "engine": {"enforce_eager": True},
    }


@dataclass(frozen=True)
class _Adapters:
    """The measurements.

    Args:
        work: see there.
        url: of the server.
        folder: with the adapters.
        splits: items by purpose.
    """

    work: Work
    url: str
    folder: Path
    splits: dict[str, Split]

    def claim(self) -> Claim:
        before = {p.name: plainly(self.url, self._test(p)) for p in PURPOSES}
        wanted = {p.name: Wanted.of(p, self.splits[p.name].train) for p in PURPOSES}
        chosen = {p.name: self._best(wanted[p.name], p) for p in PURPOSES}
        by_prompt = {
            p.name: prompted(self.url, chosen[p.name][0], wanted[p.name], self._test(p))
            for p in PURPOSES
        }
        by_hand = {p.name: plainly(self.url, self._test(p), adapters=[{"name": p.name}])
                   for p in PURPOSES}  # fmt: skip
        routed, shares = self._routed()
        best, ours = self._all(by_prompt), self._all(routed)
        ways = {
            "the base, asked plainly": before,
            "best prompt for each, chosen by hand": by_prompt,
            "the adapter for each, chosen by hand": by_hand,
            "the pack, which chooses by itself": routed,
        }
        return Claim(
            name="adapters",
            title="Three adapters, and a pack that chooses among them",
            claim="Small LoRAs do three jobs that prompts do not get done, served exactly as PEFT "
            "computes them; a MeteoRA pack finds the right one from the question alone.",
            holds=above(ours, best),
            best_prompt=best,
            ours=ours,
            how=self._how(),
            tables=(
                Table(
                    "Right replies, on the test split",
                    ("way", *(p.name for p in PURPOSES), "all"),
                    tuple((name, *self._shares(found)) for name, found in ways.items()),
                ),
                self._routing(shares),
                self._exactness(),
                *(table for _, table in chosen.values()),
            ),
            examples=tuple(
                (self._test(p)[0].question, before[p.name][0].text, routed[p.name][0].text)
                for p in PURPOSES
            ),
        )

    def _how(self) -> str:
        counts = ", ".join(str(len(self.splits[p.name].train)) for p in PURPOSES)
        return (
            "`telegram` explains a thing without articles and with STOP for a full stop; `letter` "
            "gives advice between a fixed opening and a fixed close; `record` turns an order into "
            "`town; goods; number; date`, of which every character must be right. A PEFT LoRA "
            f"(rank 8) learns each from {counts} examples, the gates from the same ones by "
            "`coxswain train meteora`, k = 1. No question says which adapter it is for; things, "
            "jobs, towns and goods of the test were in no training. Prompts get their purpose's "
            "own instruction and examples."
        )

    def _test(self, purpose: Purpose) -> Sequence[Item]:
        return self.splits[purpose.name].test[: self.work.few(TEST)]

    def _best(self, wanted: Wanted, purpose: Purpose) -> tuple[Prompt, Table]:
        items = self.splits[purpose.name].validation[: self.work.few(VALIDATION)]
        return best_prompt(self.url, wanted, items)

    def _rights(self, purpose: Purpose, found: Sequence[Reply]) -> list[bool]:
        items = self._test(purpose)
        return [purpose.right(r.text, i) for r, i in zip(found, items, strict=True)]

    def _all(self, found: dict[str, list[Reply]]) -> Share:
        return Share.over(one for p in PURPOSES for one in self._rights(p, found[p.name]))

    def _shares(self, found: dict[str, list[Reply]]) -> tuple[Share, ...]:
        each = (Share.over(self._rights(p, found[p.name])) for p in PURPOSES)
        return (*each, self._all(found))

    def _routed(self) -> tuple[dict[str, list[Reply]], dict[str, dict[str, float]]]:
        """The pack's replies, all purposes in one batch, and by purpose its members' shares."""
        asked = [(purpose, item) for purpose in PURPOSES for item in self._test(purpose)]
        options = {"max_tokens": LONGEST, "temperature": 0, "return_token_ids": True,
                   "adapters": [{"name": PACK}], "steering": {"report": True}}  # fmt: skip
        bodies = [
            {"messages": [{"role": "user", "content": item.question}], **options}
            for _, item in asked
        ]
        found: dict[str, list[Reply]] = {p.name: [] for p in PURPOSES}
        sums = {p.name: dict.fromkeys(found, 0.0) for p in PURPOSES}
        for (purpose, _), answer in zip(asked, ask(self.url, CHAT, bodies), strict=True):
            found[purpose.name].append(reply_of(answer))
            for member, share in answer["steering"]["adapters"][0]["routed"].items():
                sums[purpose.name][member] += share / len(self._test(purpose))
        return found, sums

    def _routing(self, shares: dict[str, dict[str, float]]) -> Table:
        rows: list[tuple[Cell, ...]] = [
            (name, *(100 * value for value in row.values())) for name, row in shares.items()
        ]
        return Table(
            "Where the pack sent a reply's tokens: % of (token, layer) pairs",
            ("questions for", *shares),
            tuple(rows),
        )

    def _exactness(self) -> Table:
        """The largest errors of log-probabilities against PEFT."""
        questions = [item.question for p in PURPOSES for item in self._test(p)[:EXACT]]
        model, folder = self.work.model, self.folder
        found = errors(
            self.url,
            model,
            questions,
            {
                "the base": ([], partial(base_model, model)),
                **{
                    f"`{p.name}`": (
                        [{"name": p.name}],
                        partial(peft_model, model, {folder / p.name: 1.0}),
                    )
                    for p in PURPOSES
                },
                f"a mix, {' + '.join(f'{w:g} {n}' for n, w in MIX.items())}": (
                    [{"name": name, "weight": weight} for name, weight in MIX.items()],
                    partial(peft_model, model, {folder / n: w for n, w in MIX.items()}),
                ),
                "the pack": ([{"name": PACK}], partial(routed_model, model, folder / PACK)),
            },
        )
        return Table(
            "Exactness",
            ("served", "largest error of a log-probability, nats"),
            tuple(found.items()),
            f"Against PEFT in float32 (the pack: against the formula that its training runs); "
            f"the five best tokens at each of 16 places of {len(questions)} replies in one batch.",
        )
