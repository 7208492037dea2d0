"""Random rows of the read-out with every rule, and what the definition makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from steering.kernels.mix import Ends, Rules
from steering.kernels.reference import Scores, mix_reference
from steering.plan import BASE, Ender, Gate, Recipe, Rule, RuleKind

HEAD = "critic"
PARAMS = (0.05, 0.5, 0.9, 1.0)
SUM, PLAUSIBLE, NUCLEUS, SELECT = RuleKind
BY_HEAD = Rule(SELECT, head=HEAD, gate=Gate.HEAD)
RULES: tuple[Rule, ...] = (
    Rule(),
    Rule(PLAUSIBLE),
    Rule(NUCLEUS),
    replace(BY_HEAD, hard=True, ender=Ender.SUM, best=True),
    replace(BY_HEAD, ender=Ender.SUM),
    Rule(PLAUSIBLE, param=1.0, count=7),
    Rule(PLAUSIBLE, count=0.1),
    Rule(SELECT, param=0.25),
    replace(BY_HEAD, hard=True),
    BY_HEAD,
    Rule(SELECT, gate=Gate.DOUBT, hard=True, ender=Ender.STREAM),
    Rule(SELECT, gate=Gate.DOUBT, param=1.0),
    replace(BY_HEAD, hard=True, ender=Ender.SUM),
    Rule(SELECT, gate=Gate.DOUBT, hard=True, best=True, ender=Ender.SUM),
)
"""One of each form; param 0 stands for a random one."""
SHARED = Rule(SELECT, param=3.0, count=5)
"""What only the torch path has."""


def name(stream: int) -> str:
    """Of a stream by its number."""
    return BASE if stream == 0 else f"stream {stream}"


@dataclass
class Batch:
    """R rows over S streams and V ids.

    Args:
        scores: per stream [R, V] float64 that the dtype holds exactly; −∞ where it lacks the id.
        coef: [R, S]; 0 where the stream's row may hold anything.
        rules: [R].
        stream: [R] number of the rule's stream.
        odds: [R] log-odds of the head.
        ends: sets of ids that end a text; row r has set r modulo their number.
    """

    scores: list[Scores]
    coef: Scores
    rules: list[Rule]
    stream: list[int]
    odds: Scores
    ends: list[list[int]]

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        rows: int,
        streams: int,
        size: int,
        dtype: torch.dtype,
        hostile: bool = False,
        coarse: float = 0.0,
        forms: Sequence[Rule] = RULES,
    ) -> Batch:
        """All rules by turns.

        Args:
            rng: what is random.
            rows: R.
            streams: S.
            size: V.
            dtype: of the scores.
            hostile: whether one in 20 scores is −∞, also of the base.
            coarse: if not 0, scores are multiples of it, so that many are equal.
            forms: of the rules; which comes first depends on `size`.
        """
        scores = [rng.normal(scale=4.0, size=(rows, size)) for _ in range(streams)]
        for own in scores:
            if coarse:
                own[:] = np.round(own / coarse) * coarse
            if hostile and size > 2:
                own[:, 1:][rng.random((rows, size - 1)) < 0.05] = -np.inf
            own[:] = torch.tensor(own).to(dtype).double().numpy()
        coef = rng.normal(size=(rows, streams)) * (rng.random((rows, streams)) < 0.7)
        coef[(coef == 0).all(1), 0] = 1.5
        coef = coef.astype(np.float32).astype(np.float64)
        rules = [forms[(row + size) % len(forms)] for row in range(rows)]
        stream = [int(rng.choice(np.flatnonzero(own))) for own in coef]
        for row, k in enumerate(stream):
            # Beside a selecting rule's stream something must be left to sum.
            if rules[row].kind is SELECT and np.count_nonzero(coef[row]) == 1:
                coef[row, (k + 1) % streams] = 1.0
            if not rules[row].param:
                rules[row] = replace(rules[row], param=float(np.float32(rng.choice(PARAMS))))
        return cls(
            scores,
            coef,
            rules,
            stream,
            rng.normal(scale=3.0, size=rows),
            [[]] if size == 1 else [[], [0, size // 2, size - 1][: size - 1], [size // 3]],
        )

    def recipe(self, row: int) -> Recipe:
        """What a row asks for."""
        weights = {name(i): float(c) for i, c in enumerate(self.coef[row]) if c}
        return Recipe(weights, replace(self.rules[row], stream=name(self.stream[row])))

    def wanted(self, row: int) -> Scores:
        """[V] what the definition says."""
        logits = {name(i): own[row] for i, own in enumerate(self.scores)}
        ends = self.ends[row % len(self.ends)]
        return mix_reference(self.recipe(row), logits | {HEAD: self.odds[row : row + 1]}, ends)

    def ending(self) -> Ends | None:
        """The sets as the kernels have them; None if nothing ends a text."""
        if not any(self.ends):
            return None
        table = torch.zeros(len(self.ends), self.scores[0].shape[1], dtype=torch.bool)
        for one, ids in zip(table, self.ends, strict=True):
            one[ids] = True
        rows = range(len(self.coef))
        return Ends(table, torch.tensor([float(row % len(table)) for row in rows]))

    def logits(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The scores, NaN on rows that do not use the stream; rows lie in a wider table."""
        found = []
        for i, own in enumerate(self.scores):
            s = torch.tensor(own).to(dtype)
            if i:
                s[torch.tensor(self.coef[:, i]) == 0] = torch.nan
            found.append(torch.cat([s, torch.full_like(s, torch.nan)], 1)[:, : s.shape[1]])
        return found

    def table(self, device: torch.device | None = None) -> torch.Tensor:
        """[R, S + 6] float32: coefficients, then what the rules are made of, as in the worker."""
        rows = zip(self.rules, self.stream, strict=True)
        of = [(r.kind, k, r.param, r.count, r.options) for r, k in rows]
        table = np.concatenate([self.coef, np.array(of, np.float64), self.odds[:, None]], 1)
        return torch.tensor(table, dtype=torch.float32, device=device)

    def control(self, device: torch.device | None = None) -> tuple[torch.Tensor, Rules]:
        """([R, S] coefficients, rules), columns of one table."""
        flat, streams, ends = self.table(device), len(self.scores), self.ending()
        if ends is not None and device is not None:
            ends = ends._replace(table=ends.table.to(device), which=ends.which.to(device))
        some = any(r.kind is SELECT and r.count for r in self.rules)
        return flat[:, :streams], Rules.of(flat[:, streams:])._replace(ends=ends, shared=some)
