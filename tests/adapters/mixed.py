"""Random layers, sets and requests of all kinds in one batch, and what the definition says of them.

Letters: T tokens, R columns and G gate rows of a set (`adapters.sets`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from adapters.kernels.gated import Group, InPlace, Route
from adapters.kernels.lines import CONSTANT, Line, Lines
from adapters.kernels.reference import Float, Term, adapter_sum, routing


@dataclass(frozen=True)
class Part:
    """An artefact of a set.

    Args:
        ranks: of its members.
        routed: whether it has gates.
        constants: per member, whether it has a constant; empty: none has.
        diagonals: per member, whether it has a diagonal; empty: none has.
    """

    ranks: tuple[int, ...]
    routed: bool = False
    constants: tuple[bool, ...] = ()
    diagonals: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What a request does with one artefact of its set; a weight of 0 is not using it."""

    weight: float
    top_k: int = 0
    temperature: float = 1.0


Set = tuple[Part, ...]


def products(parts: Set) -> int:
    """P."""
    return sum(sum(part.ranks) for part in parts)


def constants(parts: Set) -> int:
    """C."""
    return sum(sum(part.constants) for part in parts)


def diagonals(parts: Set) -> int:
    """D."""
    return sum(sum(part.diagonals) for part in parts)


def columns(parts: Set) -> int:
    """R."""
    return products(parts) + constants(parts) + diagonals(parts)


def places(parts: Set) -> list[list[tuple[slice, int | None, int | None]]]:
    """Per part and member: its products, its constant and its diagonal, in the order of a slot."""
    product, constant = 0, products(parts)
    diagonal = constant + constants(parts)
    found = []
    for part in parts:
        own = []
        none = (False,) * len(part.ranks)
        kinds = part.constants or none, part.diagonals or none
        for rank, adds, scales in zip(part.ranks, *kinds, strict=True):
            span = slice(product, product + rank)
            own.append((span, constant if adds else None, diagonal if scales else None))
            product, constant, diagonal = product + rank, constant + adds, diagonal + scales
        found.append(own)
    return found


def gates(parts: Set) -> int:
    """G."""
    return sum(len(part.ranks) for part in parts if part.routed)


def line(parts: Set, asks: Sequence[Ask]) -> Line:
    """The line of a request."""
    weight = np.zeros(columns(parts), np.float32)
    member = np.full(columns(parts), CONSTANT, np.int32)
    rows: list[tuple[int, int, float]] = []
    for i, (part, ask, own) in enumerate(zip(parts, asks, places(parts), strict=True)):
        for j, (span, *ones) in enumerate(own):
            for column in (*range(span.start, span.stop), *(c for c in ones if c is not None)):
                weight[column] = ask.weight
                member[column] = len(rows) + j if part.routed else CONSTANT
        if part.routed:
            top_k = ask.top_k if ask.weight else 0
            rows += [(i, top_k, ask.temperature)] * len(part.ranks)
    artefact, top_ks, temperatures = zip(*rows, strict=True) if rows else ((), (), ())
    return Line(
        weight,
        member,
        np.array(artefact, np.int32),
        np.array(top_ks, np.int32),
        np.array(temperatures, np.float32),
        constants(parts),
        diagonals(parts),
    )


@dataclass
class Layer:
    """Packed layers with random W, and slots full of NaN that must not be read.

    Args:
        into: columns of x.
        sizes: output columns of each packed layer.
        sets: slot → the set in it.
        dtype: of everything but the gates.
        slots: of the engine.
        room: rank indices of a slot.
        seed: of the weights.
        exact: gates of which each looks at one column of x and multiplies it by a power of two.
            So no score is rounded, whatever the dtype and the order of sums, and many are equal.
        across: whether the columns of B are contiguous, instead of its rows.
    """

    into: int
    sizes: tuple[int, ...]
    sets: dict[int, Set]
    dtype: torch.dtype
    slots: int = 4
    room: int = 40
    seed: int = 0
    exact: bool = True
    across: bool = False
    a: list[torch.Tensor] = field(init=False)
    b: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.weight = self.draw(sum(self.sizes), self.into) / np.sqrt(self.into)
        shape = (self.slots, 1, self.room, self.into)
        self.a = [torch.full(shape, torch.nan, dtype=self.dtype) for _ in self.sizes]
        shapes = [(self.slots, 1, size, self.room) for size in self.sizes]
        self.b = [torch.full(shape, torch.nan, dtype=self.dtype) for shape in shapes]
        if self.across:
            self.b = [b.transpose(2, 3).contiguous().transpose(2, 3) for b in self.b]
        for slot, parts in self.sets.items():
            r, g = columns(parts), gates(parts)
            for a, b, size in zip(self.a, self.b, self.sizes, strict=True):
                p = products(parts)
                a[slot, 0, :p] = torch.from_numpy(self.draw(p, self.into) / np.sqrt(self.into))
                a[slot, 0, r : r + g] = torch.from_numpy(self._gates(g))
                b[slot, 0, :size, :r] = torch.from_numpy(self.draw(size, r))

    def draw(self, *shape: int) -> Float:
        """Normal numbers that the dtype holds exactly."""
        values = torch.from_numpy(self.random.standard_normal(shape)).to(self.dtype)
        found: Float = values.double().numpy()
        return found

    def _gates(self, count: int) -> Float:
        if not self.exact:
            return self.draw(count, self.into)
        found = np.zeros((count, self.into))
        places = self.random.integers(0, self.into, count)
        found[np.arange(count), places] = self.random.choice([0.5, 1, -1, 2], count)
        return found

    def part(self, start: int, stop: int) -> Layer:
        """What the rank holds whose part of the input is x[:, start:stop].

        The ranks' outputs are summed, so only the first adds constants.
        """
        found = copy(self)
        found.into, found.weight = stop - start, self.weight[:, start:stop]
        found.a = [a[..., start:stop].contiguous() for a in self.a]
        if start:
            found.b = [b.clone() for b in self.b]
            for b, (slot, parts) in itertools.product(found.b, self.sets.items()):
                first = products(parts)
                b[slot, 0, :, first : first + constants(parts)] = 0
        return found

    def base(self, x: Float) -> torch.Tensor:
        """[T, Σ sizes], W x in the dtype."""
        return torch.from_numpy(x @ self.weight.T).to(self.dtype)

    def wanted(self, x: Float, lines: Lines, asks: Sequence[Sequence[Ask]]) -> Float:
        """[T, Σ sizes] by the definition.

        Args:
            x: [T, in].
            lines: which tokens use which request's line.
            asks: per line, what the request does with each artefact of its set.
        """
        found, start = [], 0
        for a_all, b_all, size in zip(self.a, self.b, self.sizes, strict=True):
            rows = []
            for t, number in enumerate(lines.tokens):
                terms = []
                if number >= 0:
                    slot = int(lines.slots[number])
                    a, b = a_all[slot, 0].double().numpy(), b_all[slot, 0].double().numpy()
                    terms = _terms(self.sets[slot], asks[number], a, b, x[t])
                rows.append(adapter_sum(x[t : t + 1], self.weight[start : start + size], terms)[0])
            found.append(np.stack(rows))
            start += size
        return np.concatenate(found, axis=1)

    def chosen(self, x: Float, lines: Lines, asks: Sequence[Sequence[Ask]], count: int) -> Float:
        """[L, count] how many tokens each line routes to each of its gate rows, all layers."""
        found = np.zeros((len(lines.lines), count))
        for a_all in self.a:
            for t, number in enumerate(lines.tokens):
                if number < 0:
                    continue
                slot = int(lines.slots[number])
                parts = self.sets[slot]
                row, a = columns(parts), a_all[slot, 0].double().numpy()
                for part, ask in zip(parts, asks[number], strict=True):
                    if not part.routed:
                        continue
                    own = slice(row, row + len(part.ranks))
                    if ask.weight:
                        picked = routing((a[own] @ x[t])[None], ask.top_k, 1.0)[0] > 0
                        first = row - columns(parts)
                        found[number, first : first + len(part.ranks)] += picked
                    row = own.stop
        return found


def groups(sets: dict[int, Set], lines: Lines, asks: Sequence[Sequence[Ask]]) -> list[Group]:
    """The same tokens as groups."""
    found = []
    for slot, parts in sets.items():
        users = np.flatnonzero((lines.tokens >= 0) & (lines.slots[lines.tokens] == slot))
        if not users.size:
            continue
        own = [asks[number] for number in lines.tokens[users]]
        gate = np.stack([lines.lines[number].weight for number in lines.tokens[users]])
        routes, row = [], columns(parts)
        for i, (part, members) in enumerate(zip(parts, places(parts), strict=True)):
            if part.routed:
                routes.append(_route([ask[i] for ask in own], members, row))
                ones = routes[-1].ones
                gate[:, routes[-1].columns] = 1.0
                if ones is not None:
                    gate[:, ones[0]] = 1.0
                row += len(members)
        counts = columns(parts), columns(parts) + gates(parts)
        kinds = constants(parts), diagonals(parts)
        tokens = torch.from_numpy(users)
        found.append(Group(slot, tokens, *counts, torch.from_numpy(gate), tuple(routes), *kinds))
    return found


Run = Callable[[int, InPlace], torch.Tensor]
"""(rank, what sums scores over ranks) → [T, Σ sizes]: what the rank's part of a layer gives."""


def over_ranks(ranks: int, run: Run) -> torch.Tensor:
    """[T, Σ sizes] float64: the sum of what the ranks give, which sum scores underway.

    Ranks run one after the other, twice: at first they only tell their scores.
    """
    told: list[list[torch.Tensor]] = []
    for rank in range(ranks):
        own: list[torch.Tensor] = []
        run(rank, lambda scores, own=own: own.append(scores.clone()))  # type: ignore[misc]
        told.append(own)
    sums = [torch.stack(scores).sum(0) for scores in zip(*told, strict=True)]
    assert sums
    found = []
    for rank in range(ranks):
        left = iter(sums)
        found.append(run(rank, lambda scores, left=left: scores.copy_(next(left))))  # type: ignore[misc]
        assert next(left, None) is None
    return torch.stack(found).double().sum(0)


def _route(
    asks: Sequence[Ask], members: Sequence[tuple[slice, int | None, int | None]], row: int
) -> Route:
    spans = [span for span, *_ in members]
    ranks = torch.tensor([span.stop - span.start for span in spans])
    ones = [(c, j) for j, (_, *own) in enumerate(members) for c in own if c is not None]
    top_k = torch.tensor([ask.top_k for ask in asks])
    return Route(
        slice(spans[0].start, spans[-1].stop),
        slice(row, row + len(members)),
        torch.arange(len(members)).repeat_interleave(ranks),
        torch.tensor([ask.weight for ask in asks]),
        top_k,
        int(top_k.max()),
        torch.tensor([ask.temperature for ask in asks]),
        None,
        (torch.tensor(ones)[:, 0], torch.tensor(ones)[:, 1]) if ones else None,
    )


def _terms(parts: Set, asks: Sequence[Ask], a: Float, b: Float, x: Float) -> list[Term]:
    terms, row = [], columns(parts)
    for part, ask, own in zip(parts, asks, places(parts), strict=True):
        learned = np.ones(len(part.ranks))
        if part.routed:
            scores = a[row : row + len(part.ranks)] @ x
            row += len(part.ranks)
            if ask.weight:
                learned = routing(scores[None], ask.top_k, ask.temperature)[0]
        for (span, constant, diagonal), gate in zip(own, learned, strict=True):
            terms.append(
                Term(
                    a[span],
                    b[:, span],
                    1.0,
                    np.array([gate * ask.weight]),
                    None if diagonal is None else b[:, diagonal],
                    None if constant is None else b[:, constant],
                )
            )
    return terms


KINDS: dict[int, Set] = {
    0: (Part((4,)),),
    1: (Part((0,), constants=(True,)),),
    2: (Part((0,), diagonals=(True,)), Part((17,)), Part((5,), False, (True,), (True,))),
    3: (
        Part((1, 0, 2, 3), True, (False, True, True, False), (True, True, False, False)),
        Part((3,), diagonals=(True,)),
        Part((2, 1), True, (), (True, True)),
    ),
}
"""A's rows of constants and diagonals are NaN: no kernel may multiply them."""
