"""The adapter sum in torch, on any device: shrink, a diagonal gate per token, expand.

    Σ_j g_j s_j B_j A_j x  =  B ( gate ⊙ (A x) )

with the members stacked along the rank, so nothing is gathered and no weight is copied: each set
of adapters that occurs costs two products over its own tokens. Tokens without an adapter are not
touched, so they keep the base's bits.

Letters: T tokens, n tokens of a group, R columns and G gate rows of a set (`adapters.sets`), M
members of a routed artefact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tally:
    """How often tokens were routed to which member.

    Args:
        requests: [n] int64, the request of each token of a group.
        counts: [Q, M] int64, by request and member; grows with every layer that runs.
    """

    requests: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Route:
    """Learned gates of one routed artefact, for the n tokens of a group.

    Args:
        columns: the artefact's columns.
        rows: its M gate rows.
        member: [columns] int64, which of the M members each column belongs to.
        weight: [n] float32, what the request multiplies the artefact by.
        top_k: [n] int64, members that each token is routed to, 1 to M.
        widest: the largest of `top_k`.
        temperature: [n] float32, T > 0.
        tally: counts how often a token of each request was routed to each member, over all
            layers; None to count nothing.
    """

    columns: slice
    rows: slice
    member: torch.Tensor
    weight: torch.Tensor
    top_k: torch.Tensor
    widest: int
    temperature: torch.Tensor
    tally: Tally | None = None

    def gates(self, scores: torch.Tensor) -> torch.Tensor:
        """[n, M] float32 gates of one layer.

        Args:
            scores: [n, M] W_gate x, any float dtype.
        """
        values, chosen = scores.float().topk(self.widest, dim=-1)
        place = torch.arange(self.widest, device=scores.device)
        beyond = place >= self.top_k[:, None]
        if self.tally is not None:
            picked = torch.zeros_like(scores, dtype=torch.int64).scatter_(
                -1, chosen, (~beyond).long()
            )
            self.tally.counts.index_add_(0, self.tally.requests, picked)
        exponents = (values / self.temperature[:, None]).masked_fill(beyond, -torch.inf)
        weights = exponents.softmax(-1) * self.weight[:, None]
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, chosen, weights)


@dataclass(frozen=True)
class Group:
    """The tokens of a step that use one set of adapters.

    Args:
        slot: the set's slot.
        tokens: [n] int64 indices of the tokens; None for all T.
        columns: R of the set.
        rows: R + G of the set.
        gate: [n, R] float32, the request's own weight of each column, 1 in routed columns; None
            where all are 1.
        routes: the routed artefacts that some of the tokens use.
    """

    slot: int
    tokens: torch.Tensor | None
    columns: int
    rows: int
    gate: torch.Tensor | None
    routes: tuple[Route, ...] = ()


def add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    sizes: Sequence[int],
    groups: Sequence[Group],
) -> None:
    """Adds the adapters' part of one linear layer, which may pack several (q, k, v).

    Each packed layer has its own A, B and gates.

    Args:
        y: [T, Σ sizes], changed in place; only rows of tokens in `groups`.
        x: [T, in].
        a: per packed layer, [slots, 1, ≥ rows, in].
        b: per packed layer, [slots, 1, ≥ size, ≥ columns].
        sizes: columns of `y` that each packed layer takes, from the left.
        groups: tokens by set; no token is in two.
    """
    for group in groups:
        xs = x if group.tokens is None else x[group.tokens]
        start = 0
        for a_all, b_all, size in zip(a, b, sizes, strict=True):
            shrunk = xs @ a_all[group.slot, 0, : group.rows].T
            gated = _gated(shrunk, group).to(x.dtype)
            added = gated @ b_all[group.slot, 0, :size, : group.columns].T
            part = y[:, start : start + size]
            if group.tokens is None:
                part += added
            else:
                part.index_add_(0, group.tokens, added)
            start += size


def _gated(shrunk: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, R] of the shrunk activations [n, R + G], each column times its gate.

    `shrunk` is this call's own, so it may be changed in place. Gates are applied in float32.
    """
    found = shrunk[:, : group.columns]
    if group.gate is not None:
        found = found.float() * group.gate
    elif group.routes:
        found = found.float()
    for route in group.routes:
        gates = route.gates(shrunk[:, route.rows])
        found[:, route.columns] *= gates[:, route.member]
    return found
