"""The definition of the adapter sum, in float64 and without any trick.

    t = W x + b0
    y = t + Σ_j g_j(x) · ( d_j ⊙ t + s_j · B_j A_j x + b_j )

t is all that the layer computes without adapters, its own bias b0 included. A LoRA adapter has no
d_j and no b_j. Two adapters with diagonals add their deviations: none sees what another did.

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
        a: [r, in]; r may be 0.
        b: [out, r].
        scale: s_j.
        gate: [T], g_j of each token.
        diagonal: [out], d_j; None: 0.
        constant: [out], b_j; None: 0.
    """

    a: Float
    b: Float
    scale: float
    gate: Float
    diagonal: Float | None = None
    constant: Float | None = None


def adapter_sum(x: Float, weight: Float, terms: Sequence[Term], bias: Float | None = None) -> Float:
    """y, [T, out].

    Args:
        x: [T, in].
        weight: W, [out, in].
        terms: the members' parts.
        bias: b0, [out]; None: 0.
    """
    y = np.array([weight @ row for row in x])
    if bias is not None:
        y += bias
    layer = y.copy()
    for term in terms:
        for t, row in enumerate(x):
            change = term.scale * (term.b @ (term.a @ row))
            if term.diagonal is not None:
                change += term.diagonal * layer[t]
            if term.constant is not None:
                change += term.constant
            y[t] += term.gate[t] * change
    return y


def similarity(u: Float, vector: Float, *, projected: bool) -> float:
    """How alike a state and a condition's vector are: their cosine, or that of the state and tanh
    of its projection on the vector (CAST, arXiv 2409.05907).

    Args:
        u: [H].
        vector: c, [H], not 0.
        projected: whether it is compared with tanh((c cᵀ / c·c) u) in place of c.
    """
    other = np.tanh(np.outer(vector, vector) / (vector @ vector) @ u) if projected else vector
    return float(u @ other / (np.linalg.norm(u) * np.linalg.norm(other)))


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
