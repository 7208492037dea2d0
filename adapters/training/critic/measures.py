"""How well a classifier tells critical tokens from others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

THRESHOLDS = (0.3, 0.5, 0.7)
"""Probabilities above which a token is taken for critical, in the table."""


def measures(scores: Tensor, targets: Tensor) -> dict[str, Any]:
    """JSON values; None where a number is not defined.

    Args:
        scores: [N] logits.
        targets: [N] bool, whether the token is critical.

    Returns:
        `tokens`; `critical`, the share of them; `auc`, the probability that a critical token has a
        higher score than another one, ties counting half; `thresholds`: a list of `threshold`,
        `precision`, `recall` and `f1`.
    """
    scores, real = scores.double(), int(targets.sum())
    rows: list[dict[str, Any]] = []
    for threshold in THRESHOLDS:
        marked = scores.sigmoid() > threshold
        hits = int((marked & targets).sum())
        precision, recall = _ratio(hits, int(marked.sum())), _ratio(hits, real)
        f1 = _ratio(2 * hits, int(marked.sum()) + real)
        rows.append({"threshold": threshold, "precision": precision, "recall": recall, "f1": f1})
    return {
        "tokens": len(scores),
        "critical": _ratio(real, len(scores)),
        "auc": _auc(scores, targets),
        "thresholds": rows,
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _auc(scores: Tensor, targets: Tensor) -> float | None:
    """Mann and Whitney's U over the number of pairs, by ranks; equal scores share theirs."""
    real = int(targets.sum())
    _, group, sizes = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0) - (sizes - 1).double() / 2)[group]
    above = float(ranks[targets].sum()) - real * (real + 1) / 2
    return _ratio(above, real * (len(scores) - real))


def table(found: dict[str, Any]) -> str:
    """The measures for a person."""
    head = (
        f"{found['tokens']} held-out tokens, {_shown(found['critical'])} critical, "
        f"AUC {_shown(found['auc'], '.3f')}"
    )
    lines = [head, "threshold  precision  recall      F1"]
    lines += [
        f"{row['threshold']:9g}  {_shown(row['precision']):>9}  {_shown(row['recall']):>6}  "
        f"{_shown(row['f1']):>6}"
        for row in found["thresholds"]
    ]
    return "\n".join(lines)


def _shown(value: float | None, style: str = ".1%") -> str:
    return "–" if value is None else format(value, style)
