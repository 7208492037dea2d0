"""The definition of the adapter sum, in float64 and without any trick.

    y = W x + Σ_j g_j(x) · s_j · B_j A_j x

Letters: T tokens, M members, k members per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """One member's part of the sum.

    Args:
        a: [r, in].
        b: [out, r].
        scale: s_j.
        gate: [T], g_j of each token.
    """

    a: Float
    b: Float
    scale: float
    gate: Float


def adapter_sum(x: Float, weight: Float, terms: Sequence[Term]) -> Float:
    """y, [T, out].

    Args:
        x: [T, in].
        weight: W, [out, in].
        terms: the members' parts.
    """
    y = np.array([weight @ row for row in x])
    for term in terms:
        for t, row in enumerate(x):
            y[t] += term.gate[t] * term.scale * (term.b @ (term.a @ row))
    return y


def routing(scores: Float, top_k: int, temperature: float) -> Float:
    """MeteoRA's gate (arXiv 2405.13053): [T, M], the softmax of the k highest scores over T.

    Args:
        scores: [T, M], W_gate x.
        top_k: k, 1 to M. Of equal scores the lower index wins.
        temperature: T > 0.
    """
    gates = np.zeros_like(scores)
    for t, row in enumerate(scores):
        chosen = np.argsort(-row, kind="stable")[:top_k]
        exponents = np.exp((row[chosen] - row[chosen].max()) / temperature)
        gates[t, chosen] = exponents / exponents.sum()
    return gates
