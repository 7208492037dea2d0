"""Random rows of the read-out with every rule, and what the definition makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steering.kernels.mix import Ends
from steering.kernels.reference import Scores, mix_reference
from steering.plan import BASE, CRITICAL_KINDS, Recipe, Rule, RuleKind

HEAD = "critic"
PARAMS = (0.05, 0.5, 0.9, 1.0)


def name(stream: int) -> str:
    """Of a stream by its number."""
    return BASE if stream == 0 else f"stream {stream}"


@dataclass
class Batch:
    """R rows over S streams and V ids.

    Args:
        scores: per stream [R, V] float64 that the dtype holds exactly; −∞ where it lacks the id.
        coef: [R, S]; 0 where the stream's row may hold anything.
        kind: [R] `RuleKind`.
        stream: [R] number of the rule's stream.
        param: [R] its parameter.
        odds: [R] log-odds of the head.
        ends: sets of ids that end a text; row r has set r modulo their number.
    """

    scores: list[Scores]
    coef: Scores
    kind: list[RuleKind]
    stream: list[int]
    param: list[float]
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
        kind = [RuleKind(row % len(RuleKind)) for row in range(rows)]
        stream = [int(rng.choice(np.flatnonzero(own))) for own in coef]
        for row, k in enumerate(stream):
            # Beside a critical rule's stream something must be left to sum.
            if kind[row] in CRITICAL_KINDS and np.count_nonzero(coef[row]) == 1:
                coef[row, (k + 1) % streams] = 1.0
        return cls(
            scores,
            coef,
            kind,
            stream,
            [float(np.float32(rng.choice(PARAMS))) for _ in range(rows)],
            rng.normal(scale=3.0, size=rows),
            [[]] if size == 1 else [[], [0, size // 2, size - 1][: size - 1], [size // 3]],
        )

    def recipe(self, row: int) -> Recipe:
        """What a row asks for."""
        weights = {name(i): float(c) for i, c in enumerate(self.coef[row]) if c}
        rule = Rule(self.kind[row], name(self.stream[row]), self.param[row], HEAD)
        return Recipe(weights, rule)

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

    def control(self) -> tuple[torch.Tensor, ...]:
        """(coef, kind, stream, param, log-odds) float32, columns of one table as in the worker."""
        columns = [self.kind, self.stream, self.param, self.odds]
        table = np.concatenate([self.coef, np.array(columns, np.float64).T], 1)
        flat = torch.tensor(table, dtype=torch.float32)
        streams = len(self.scores)
        return (flat[:, :streams], *flat[:, streams:].unbind(1))
