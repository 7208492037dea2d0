"""Guided search as data: how blocks are drawn, scored, chosen and accepted; and that arithmetic.

A reply grows block by block. Letters: K blocks are drawn behind each of W kept replies (beams).
Front end only: the worker sees the plans of single rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["raw", "probability", "log_probability"]


@dataclass(frozen=True, slots=True)
class Score:
    """`weight · r + Σ_t (log p_of(y_t) − log p_to(y_t))`; larger is better.

    Args:
        head: gives r after the whole reply; '' for no such term.
        weight: multiplies r; finite.
        scale: what r is: the head's number x, σ(x), or log σ(x).
        of: the stream whose log-probabilities of the drawn tokens are added; '' for no such term.
        to: the stream whose log-probabilities are subtracted; '' with `of`.
        body: the stream whose hidden state the head reads; filled in when it is resolved.
    """

    head: str = ""
    weight: float = 1.0
    scale: Scale = "raw"
    of: str = ""
    to: str = ""
    body: str = ""

    @property
    def ratio(self) -> tuple[str, ...]:
        """The streams of the log-ratio."""
        return (self.of, self.to) if self.of else ()

    def total(self, number: float | None, ratio: float) -> float:
        """The score; −∞ where it is not a finite number, which loses.

        Args:
            number: the head's; None without one.
            ratio: Σ_t of the log-ratio, nats; 0 without one.
        """
        found = ratio
        if number is not None:
            found += self.weight * scaled(number, self.scale)
        return found if math.isfinite(found) else -math.inf


@dataclass(frozen=True, slots=True)
class Proposal:
    """How a round of blocks is drawn.

    Args:
        weights: (stream, c_i) of the sum that the tokens are drawn from, without zeros; the base
            runs only if it is among them, or read.
        k: blocks behind each beam, ≥ 1.
        score: of each block; None: the first is taken.
    """

    weights: tuple[tuple[str, float], ...]
    k: int
    score: Score | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """All that this names, base included, each once."""
        read = () if self.score is None else (*self.score.ratio, self.score.body)
        return tuple(n for n in dict.fromkeys((*(s for s, _ in self.weights), *read)) if n)


@dataclass(frozen=True, slots=True)
class Search:
    """A guided search.

    Args:
        draw: the first round of every block.
        beams: W, replies that are kept, ≥ 1; 1 where there is `accept`.
        tokens: longest block; 0: what is left of the reply.
        until: text whose completion ends a block; '' for none.
        beta: None: the W best blocks are kept; else W are drawn without replacement, with
            probabilities ∝ exp(beta · score), beta > 0.
        accept: the kept block's score must reach it; None: any will do.
        fallback: draws the block again where it does not; None without `accept`.
    """

    draw: Proposal
    beams: int = 1
    tokens: int = 0
    until: str = ""
    beta: float | None = None
    accept: float | None = None
    fallback: Proposal | None = None

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """Both."""
        return (self.draw,) if self.fallback is None else (self.draw, self.fallback)

    @property
    def streams(self) -> tuple[str, ...]:
        """All that this names, base included, each once."""
        return tuple(dict.fromkeys(name for p in self.proposals for name in p.streams))

    @property
    def drawn(self) -> int:
        """Most blocks of one round."""
        return max(self.draw.k * self.beams, self.fallback.k if self.fallback else 0)


def scaled(x: float, scale: Scale) -> float:
    """A head's number x as a score reads it: x, σ(x) or log σ(x)."""
    if scale == "raw" or not math.isfinite(x):
        return x
    log = min(x, 0.0) - math.log1p(math.exp(-abs(x)))
    return log if scale == "log_probability" else math.exp(log)


def chosen(
    scores: Sequence[float], keep: int, beta: float | None, uniforms: Sequence[float] = ()
) -> list[int]:
    """Which of the scored blocks are kept, first the one that comes first.

    With `beta` the Gumbel-top-k trick (Kool, van Hoof, Welling, arXiv 1903.06059): the largest of
    `beta · score_i + g_i`, g_i = −log(−log u_i), are draws without replacement ∝ exp(beta · score).

    Args:
        scores: finite or −∞.
        keep: how many; all if there are fewer.
        beta: None: the largest scores, of equals the first.
        uniforms: with `beta`, one in (0, 1) for each score.
    """
    keys = list(scores)
    if beta is not None:
        noise = (-math.log(-math.log(u)) for u in uniforms)
        keys = [beta * s + g for s, g in zip(scores, noise, strict=True)]
    return sorted(range(len(keys)), key=lambda i: -keys[i])[:keep]
