"""The reward: VADER's compound score of a reply (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import (  # type: ignore[import-untyped]
        SentimentIntensityAnalyzer,
    )

    return SentimentIntensityAnalyzer()


def compound(prompt: object, reply: str) -> float:
    """How positive a reply's words are, from −1 to 1; of the form that `coxswain train` calls.

    Args:
        prompt: not read.
        reply: text.
    """
    found: float = _analyser().polarity_scores(reply)["compound"]
    return found
