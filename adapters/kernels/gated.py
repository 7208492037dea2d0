"""The adapter sum in torch, on any device: shrink, a diagonal gate per token, expand.

    Σ_j g_j ( d_j ⊙ t + s_j B_j A_j x + b_j )  =  B ( gate ⊙ u ) + t ⊙ D gate

with the members stacked along the rank, so no weight is copied per token: each set of adapters that
occurs costs two products over its own tokens, and sets with few tokens share two batched products.
t is the layer's own output, u is A x for products and 1 for constants, and D are the columns of B
that are diagonals. Tokens without an adapter are not touched, so they keep the base's bits.

Letters: T tokens, n tokens of a group, R columns and G gate rows of a set (`adapters.sets`), C of
the columns constants and D diagonals, M members of a routed artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

NOTHING, CONSTANTS, PRODUCTS = 0, 1, 2
"""What a set does to the output of a decoder layer: nothing, add constants, or read it too."""

InPlace = Callable[[torch.Tensor], None]


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
        columns: the artefact's products.
        rows: its M gate rows.
        member: [columns] int64, which of the M members each product belongs to.
        weight: [n] float32, what the request multiplies the artefact by.
        top_k: [n] int64, members that each token is routed to, 1 to M.
        widest: the largest of `top_k`.
        temperature: [n] float32, T > 0.
        tally: counts how often a token of each request was routed to each member, over all
            layers; None to count nothing.
        ones: the columns of the artefact's constants and diagonals, int64, and the member that
            each belongs to; None if it has none.
    """

    columns: slice
    rows: slice
    member: torch.Tensor
    weight: torch.Tensor
    top_k: torch.Tensor
    widest: int
    temperature: torch.Tensor
    tally: Tally | None = None
    ones: tuple[torch.Tensor, torch.Tensor] | None = None

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


@dataclass(frozen=True, eq=False)
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
        constants: C of the set.
        diagonals: D of the set.
        judged: whether conditions change `gate` while the pass runs.
    """

    slot: int
    tokens: torch.Tensor | None
    columns: int
    rows: int
    gate: torch.Tensor | None
    routes: tuple[Route, ...] = ()
    constants: int = 0
    diagonals: int = 0
    judged: bool = False

    @property
    def sums(self) -> int:
        """R − D, the first diagonal."""
        return self.columns - self.diagonals

    @property
    def products(self) -> int:
        """R − D − C, the first constant."""
        return self.sums - self.constants

    def added(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        over_ranks: InPlace | None = None,
    ) -> torch.Tensor:
        """[n, size], what one layer adds to its output.

        Args:
            x: [n, in] of the group's tokens.
            t: [n, size], the layer's own output; not read without diagonals.
            a: [slots, 1, ≥ rows, in].
            b: [slots, 1, ≥ size, ≥ columns].
            over_ranks: sums float32 scores of a part of the input over all parts; None where x is
                all of it.
        """
        shrunk = x @ a[self.slot, 0, : self.rows].T
        scores = shrunk[:, self.columns :]
        if self.routes and over_ranks is not None:
            scores = scores.float().contiguous()
            over_ranks(scores)
        gated = self._gated(shrunk, scores).to(x.dtype)
        own = b[self.slot, 0, : t.shape[1], : self.columns]
        if not self.diagonals:
            return gated @ own.T
        # Never 1 + d: in bfloat16 it has fewer digits of d than d itself.
        sums, factors = gated.tensor_split([self.sums], 1)
        of_sums, of_factors = own.tensor_split([self.sums], 1)
        return (sums @ of_sums.T).addcmul_(factors @ of_factors.T, t)

    def _gated(self, shrunk: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[n, R] of the shrunk activations [n, ≥ R], each column times its gate.

        `shrunk` is the caller's own, so it may be changed in place. Gates are applied in float32,
        learned ones as the scores [n, G] say.
        """
        found = shrunk[:, : self.columns]
        if self.constants or self.diagonals:
            found[:, self.products :] = 1.0
        if self.gate is not None:
            found = found.float() * self.gate
        elif self.routes:
            found = found.float()
        for route in self.routes:
            own = slice(route.rows.start - self.columns, route.rows.stop - self.columns)
            gates = route.gates(scores[:, own])
            found[:, route.columns] *= gates[:, route.member]
            if route.ones is not None:
                columns, member = route.ones
                found[:, columns] *= gates[:, member]
        return found


@dataclass(frozen=True)
class Bundle:
    """Small groups of products without routes, computed together.

    Letters: S sets, m tokens of the largest.

    Args:
        slots: the sets' slots; a slice where they are consecutive, which copies no weights.
        tokens: [S · m] int64; a group with fewer than m tokens repeats one, with gates of 0.
        gate: [S, m, R] float32, R that of the widest set; 0 beyond a set's own.
    """

    slots: slice | torch.Tensor
    tokens: torch.Tensor
    gate: torch.Tensor

    diagonals = 0

    def added(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        over_ranks: InPlace | None = None,
    ) -> torch.Tensor:
        """[S · m, size], what one layer adds to its output; see `Group.added`. No scores here.

        The slots' rows and columns up to R must be finite, their sets' own or not.
        """
        sets, most, columns = self.gate.shape
        shrunk = x.view(sets, most, -1) @ a[self.slots, 0, :columns].transpose(1, 2)
        gated = (shrunk * self.gate).to(x.dtype)
        return (gated @ b[self.slots, 0, : t.shape[1], :columns].transpose(1, 2)).flatten(0, 1)


def add_to_states(
    y: torch.Tensor,
    residual: torch.Tensor | None,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    filled: torch.Tensor,
    groups: Sequence[Group | Bundle],
) -> None:
    """Adds the adapters' part of a decoder layer's output, as of a linear layer whose weight is
    the identity. No pack is routed there.

    Args:
        y: [T, H], changed in place.
        residual: [T, H]; the state is y + residual; None: it is y.
        a: one, as for `add_adapters`.
        b: likewise.
        filled: [slots] int8, on the CPU: `NOTHING`, `CONSTANTS` or `PRODUCTS` of each slot's set.
        groups: tokens by set.
    """
    kinds = [int(filled[group.slots if isinstance(group, Bundle) else group.slot].max())
             for group in groups]  # fmt: skip
    own = [replace(group, routes=()) if isinstance(group, Group) else group
           for group, kind in zip(groups, kinds, strict=True) if kind != NOTHING]  # fmt: skip
    if own:
        x = y if residual is None or max(kinds) != PRODUCTS else y + residual
        add_adapters(y, x, a, b, [y.shape[1]], own)


SMALL = 8
"""Tokens of a group up to which it is bundled: decoding, where starting an operation costs more
than what it computes."""


def bundled(groups: Sequence[Group]) -> tuple[Group | Bundle, ...]:
    """The groups, small ones put together."""
    small = [g for g in groups if _bundles(g)]
    if len(small) < 2:
        return tuple(groups)
    small.sort(key=lambda g: g.slot)
    slots = torch.tensor([g.slot for g in small], device=_tokens(small[0]).device)
    first, last = small[0].slot, small[-1].slot
    most = max(len(_tokens(g)) for g in small)
    gate = torch.zeros(len(small), most, max(g.columns for g in small), device=slots.device)
    tokens = torch.empty(len(small), most, dtype=torch.int64, device=slots.device)
    for i, group in enumerate(small):
        own = _tokens(group)
        tokens[i] = own[0]
        tokens[i, : len(own)] = own
        gate[i, : len(own), : group.columns] = 1.0 if group.gate is None else group.gate
    consecutive = last - first + 1 == len(small)
    found = Bundle(slice(first, last + 1) if consecutive else slots, tokens.flatten(), gate)
    return (found, *(g for g in groups if g not in small))


def _bundles(group: Group) -> bool:
    plain = not group.routes and not group.judged and group.products == group.columns
    return plain and group.tokens is not None and len(group.tokens) <= SMALL


def _tokens(group: Group) -> torch.Tensor:
    assert group.tokens is not None
    return group.tokens


def add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    sizes: Sequence[int],
    groups: Sequence[Group | Bundle],
    over_ranks: InPlace | None = None,
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
        over_ranks: where x and A are a part of the layer's input: sums scores over all parts.
    """
    for group in groups:
        xs = x if group.tokens is None else x[group.tokens]
        start = 0
        for a_all, b_all, size in zip(a, b, sizes, strict=True):
            part = y[:, start : start + size]
            own = part if group.tokens is None or not group.diagonals else part[group.tokens]
            added = group.added(xs, own, a_all, b_all, over_ranks)
            if group.tokens is None:
                part += added
            else:
                part.index_add_(0, group.tokens, added)
            start += size
