"""Sampled answers of a soak, checked after it: every token's log-probability computed again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from load_tests.soak.kinds import BY_NAME, TOLERANCE

if TYPE_CHECKING:
    from load_tests.soak.oracle import Oracle


@dataclass
class Reservoir:
    """A fair sample of what it is offered, so many of each kind.

    Args:
        size: of each kind.
        dice: who is kept.
    """

    size: int
    dice: random.Random
    kept: dict[str, list[Any]] = field(default_factory=dict)
    offered: dict[str, int] = field(default_factory=dict)

    def offer(self, kind: str, sample: Any) -> None:
        """Keeps it, perhaps, perhaps in the place of another."""
        kept = self.kept.setdefault(kind, [])
        self.offered[kind] = self.offered.get(kind, 0) + 1
        if len(kept) < self.size:
            kept.append(sample)
        elif (place := self.dice.randrange(self.offered[kind])) < self.size:
            kept[place] = sample


@dataclass
class Outcome:
    """The outcome of the check.

    Args:
        answers: how many replies were computed again.
        tokens: of them.
        worst: largest error of a log-probability that counts as right.
        wrong: the wrong ones, with what was found.
    """

    answers: int = 0
    tokens: int = 0
    worst: float = 0.0
    wrong: list[dict[str, Any]] = field(default_factory=list)


def check(
    oracle: Oracle, samples: Sequence[Mapping[str, Any]], say: Callable[[float], None]
) -> Outcome:
    """Computes the samples again.

    Args:
        oracle: knows what is right.
        samples: each with `kind`, `messages`, `contents` (what a changing name may have stood for;
            one of them must fit), `choices` ([ids, logprobs] each) and `best` (values and the
            chosen one, of best_of_n with a report).
        say: called with the share that is done.
    """
    found = Outcome()
    for number, sample in enumerate(samples):
        kind, prompt = BY_NAME[sample["kind"]], oracle.prompt(sample["messages"])
        for ids, logprobs in sample["choices"]:
            errors = [
                _error(oracle.logprobs(kind, prompt, ids, content), logprobs)
                for content in sample["contents"] or [""]
            ]
            found.answers += 1
            found.tokens += len(ids)
            if min(errors) < TOLERANCE:
                found.worst = max(found.worst, min(errors))
            else:
                found.wrong.append({"error": min(errors), **sample})
        if best := sample.get("best"):
            assert kind.steering is not None
            ids = sample["choices"][0][0]
            value = oracle.value(kind.steering["value"], [*prompt, *ids])
            reported = best["values"][best["chosen"]]
            if reported < max(best["values"]) or abs(reported - value) > TOLERANCE:
                found.wrong.append({"error": abs(reported - value), "value": value, **sample})
        say((number + 1) / len(samples))
    return found


def _error(right: Sequence[float], reported: Sequence[float]) -> float:
    if len(right) != len(reported) or not all(map(math.isfinite, reported)):
        return math.inf
    return max(abs(a - b) for a, b in zip(right, reported, strict=True))
