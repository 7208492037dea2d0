"""A guided search once more, as a plain loop over the report's blocks, in float64.

Every kept and dropped block is scored from its ids by the papers' formulas, with a full forward of
`transformers`; the choices are made again, with the recorded uniforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from steering.method import log_softmax
from tests.reference import load, scores
from tests.server.heads.headed import Slow

TOLERANCE = 1e-4
"""Of a score, relative to what multiplies its parts; and the least margin of a choice."""

Ids = Sequence[int]
Score = Callable[[Ids, Ids], float]
"""(prompt and reply before the block, block) → its score."""


def likelihood(slow: Slow, stream: str, before: Ids, block: Ids) -> float:
    """Σ_t log p(block_t | before, block_<t) of a stream."""
    if not block:
        return 0.0
    model = slow.base if stream == "base" else load(slow.root / stream)
    rows = scores(model, [*before, *block])[len(before) - 1 : -1]
    return sum(float(log_softmax(row)[i]) for row, i in zip(rows, block, strict=True))


def sigmoid(x: float) -> float:
    """The probability whose log-odds are x."""
    return 1 / (1 + math.exp(-x))


@dataclass
class Beam:
    """A kept reply."""

    ids: list[int]
    score: float = -math.inf
    finished: bool = False


@dataclass(frozen=True)
class Loop:
    """The loop.

    Args:
        prompt: ids.
        score: of a block of the first proposal, in one beam; of the whole reply if `beams` > 1.
        fallback: of a block of the fallback; None: the only one is taken.
        beams: W.
        beta: of soft choices; None: the best are kept.
        threshold: δ; None: all are accepted.
        scale: what multiplies the parts of the score, for its tolerance.
    """

    prompt: Ids
    score: Score
    fallback: Score | None = None
    beams: int = 1
    beta: float | None = None
    threshold: float | None = None
    scale: float = 1.0

    def replay(self, report: Mapping[str, Any]) -> list[int]:
        """The reply that the report's draws lead to; checks every number on the way."""
        beams = [Beam([])]
        rounds = report["rounds"]
        for at, one in enumerate(rounds):
            score = self.score if one["by"] == "draw" else self.fallback
            pool = self._pool(beams, one, score)
            kept = self._kept(pool, one)
            assert one["kept"] == kept, f"round {at}"
            if "accepted" in one:
                assert self.threshold is not None
                best = pool[kept[0]].score
                assert abs(best - self.threshold) > TOLERANCE * self.scale, "take another seed"
                assert one["accepted"] == (best >= self.threshold)
                assert one["accepted"] or rounds[at + 1]["by"] == "fallback"
                if not one["accepted"]:
                    continue
            beams = [pool[i] for i in kept]
        assert all(beam.finished for beam in beams)
        returned = max(beams, key=lambda beam: beam.score)
        assert beams[report["returned"]].ids == returned.ids
        return returned.ids

    def _pool(
        self, beams: Sequence[Beam], one: Mapping[str, Any], score: Score | None
    ) -> list[Beam]:
        pool = []
        for draw in one["draws"]:
            before, block = beams[draw["beam"]], draw["token_ids"]
            ids = [*before.ids, *block]
            assert draw["tokens"] == len(block) and bool(block) != before.finished
            if score is None:
                assert "score" not in draw
                number = 0.0
            else:
                whole = self.beams > 1
                number = score(self.prompt if whole else [*self.prompt, *before.ids],
                               ids if whole else block)  # fmt: skip
                assert draw["score"] == pytest.approx(number, abs=TOLERANCE * self.scale)
            pool.append(Beam(ids, number, draw["finished"]))
        return pool

    def _kept(self, pool: Sequence[Beam], one: Mapping[str, Any]) -> list[int]:
        keys = np.array([beam.score for beam in pool])
        if self.beta is not None and "uniforms" in one:
            keys = self.beta * keys - np.log(-np.log(np.array(one["uniforms"])))
        order = np.argsort(-keys, kind="stable")
        for left, right in pairwise(order[: self.beams + 1]):
            gap = keys[left] - keys[right]
            same = pool[left].ids == pool[right].ids or len({b.score for b in pool}) == 1
            assert same or gap > TOLERANCE * self.scale, "take another seed"
        return [int(i) for i in order[: self.beams]]
