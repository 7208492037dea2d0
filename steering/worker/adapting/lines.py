"""Which tokens of a stream batch use which adapters, as lines for the Triton kernels.

The same as `Adapted.groups`, for the other kind of kernel: what is prepared is one line per
request, and the lines of requests that go on decoding are made once.

Letters: Q requests of this step, T tokens of the stream batch, L lines, M members of a routed
artefact.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from adapters.kernels.lines import CONSTANT, Line, Lines
from adapters.sets import Layout
from steering.plan import AdapterUse
from steering.worker.adapting.groups import Adapted, Routed
from steering.worker.plan.batches import Bool, Int64


class Place(NamedTuple):
    """Where the routes of one pack are counted, for the lines that have its gate in one place.

    Args:
        digest: of the pack.
        first: its first gate row in their sets.
        members: M.
        requests: [n] int64 the lines' requests.
        numbers: [n] int64 the lines.
    """

    digest: str
    first: int
    members: int
    requests: Int64
    numbers: Int64

    def routed(
        self,
        stream: str,
        requests: int,
        counts: torch.Tensor,
        own: torch.Tensor,
        numbers: torch.Tensor,
    ) -> Routed:
        """Where the tokens were routed; stays on the device.

        Args:
            stream: that ran.
            requests: Q.
            counts: [≥ L, ≥ G] int32, how often each line's tokens were routed by each gate row.
            own: the lines' requests, on the device.
            numbers: the lines, on the device.
        """
        found = torch.zeros(requests, self.members, dtype=torch.int64, device=counts.device)
        rows = counts[:, self.first : self.first + self.members].index_select(0, numbers)
        return Routed(stream, self.digest, found.index_add_(0, own, rows.long()))


@dataclass(frozen=True, eq=False)
class StreamLines:
    """The lines of one stream batch.

    Args:
        lines: L of them, one per request that uses an adapter here; or several, where what acts
            differs among its tokens.
        requests: [L] the requests.
        layouts: [L] their sets' layouts.
        uses: [L] what acts.
    """

    lines: Lines
    requests: tuple[int, ...]
    layouts: tuple[Layout, ...]
    uses: tuple[tuple[AdapterUse, ...], ...]

    def places(self) -> list[Place]:
        """Where the kernels count how often tokens were routed to each pack's members."""
        found: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        for number, (layout, uses) in enumerate(zip(self.layouts, self.uses, strict=True)):
            used = {use.digest for use in uses}
            for block in layout.blocks:
                if block.gate is not None and block.digest in used:
                    first = block.gate - layout.columns
                    found[block.digest, first, len(block.ranks)].append(number)
        return [
            Place(digest, first, members, np.array([self.requests[n] for n in own]), np.array(own))
            for (digest, first, members), own in found.items()
        ]


Mask = tuple[tuple[bool, ...], ...]
"""Per use, whether each of its members acts."""


def stream_lines(
    adapted: Adapted,
    stream: str,
    owner: str,
    token_requests: Int64,
    active: Bool | None = None,
) -> StreamLines | None:
    """The lines of one stream batch, None if no request uses an adapter in it.

    Args:
        adapted: the adapters of this step's requests.
        stream: the stream that runs.
        owner: the stream whose layers it runs: itself, or the original of a twin.
        token_requests: [T] index of each token's request.
        active: [T, W] whether each of `adapted.wheres` holds for a token; None: all do.
    """
    made: list[tuple[int, Layout, tuple[AdapterUse, ...], Mask | None]] = []
    slots = []
    line_of = np.full(len(adapted.uses), -1, np.int32)
    apart: list[tuple[Int64, int]] = []  # tokens that have not their request's one line
    present = np.zeros(len(adapted.uses), bool)
    present[token_requests] = True
    for q in np.flatnonzero(present):
        set_id = int(adapted.sets[q])
        layout = adapted.layouts[set_id].get(owner) if set_id else None
        if layout is None:
            continue
        uses = tuple(use for use in adapted.uses[q] if use.stream == stream and use.weight)
        if active is not None and any(use.where for use in uses):
            own = np.flatnonzero(token_requests == q)
            for mask, tokens in _masks(adapted, uses, own, active):
                acting = tuple(u for u, m in zip(uses, mask, strict=True) if any(m))
                if acting:
                    apart.append((tokens, len(made)))
                    made.append((int(q), layout, acting, tuple(m for m in mask if any(m))))
                    slots.append(adapted.slots[set_id])
        elif uses:
            line_of[q] = len(made)
            made.append((int(q), layout, uses, None))
            slots.append(adapted.slots[set_id])
    if not made:
        return None
    requests, layouts, all_uses, _ = zip(*made, strict=True)
    lines = tuple(_line(layout, uses, mask) for _, layout, uses, mask in made)
    of_tokens = line_of[token_requests]
    for tokens, number in apart:
        of_tokens[tokens] = number
    found = Lines(lines, np.array(slots, np.int32), of_tokens)
    return StreamLines(found, requests, layouts, all_uses)


def _masks(
    adapted: Adapted, uses: tuple[AdapterUse, ...], own: Int64, active: Bool
) -> list[tuple[Mask, Int64]]:
    """What acts on the tokens `own` of one request, and on which of them."""
    by_digest = {use.digest: use for use in uses}
    acts = adapted.acting([by_digest], np.zeros(own.size, np.int64), active[own])
    every = [acts.get(use.digest, np.ones((own.size, 1), bool)) for use in uses]
    kinds, which = np.unique(np.concatenate(every, axis=1), axis=0, return_inverse=True)
    ends = np.cumsum([one.shape[1] for one in every])[:-1]
    return [
        (tuple(tuple(part.tolist()) for part in np.split(kind, ends)), own[which.ravel() == i])
        for i, kind in enumerate(kinds)
    ]


@lru_cache(4096)
def _line(layout: Layout, uses: tuple[AdapterUse, ...], mask: Mask | None = None) -> Line:
    """The line of a request; artefacts of the set that it does not use get the weight 0."""
    acts = dict(zip((use.digest for use in uses), mask or (), strict=False))
    by_digest = {use.digest: use for use in uses}
    gates = layout.gates
    weight = np.zeros(layout.columns, np.float32)
    member = np.full(layout.columns, CONSTANT, np.int32)
    artefact, top_k = np.zeros(gates, np.int32), np.zeros(gates, np.int32)
    temperature = np.ones(gates, np.float32)
    for number, block in enumerate(layout.blocks):
        use = by_digest.get(block.digest)
        weight[block.columns] = use.weight if use else 0.0
        if len(parts := acts.get(block.digest, ())) > 1:
            weight[block.columns] *= np.array(parts, np.float32)[block.of_columns]
        if block.gate is None:
            continue
        first, members = block.gate - layout.columns, len(block.ranks)
        member[block.products] = first + np.repeat(np.arange(members), block.ranks)
        for column, own in block.ones:
            member[column] = first + own
        rows = slice(first, first + members)
        artefact[rows] = number
        if use:
            top_k[rows], temperature[rows] = use.top_k, use.temperature
    kinds = layout.constants, layout.diagonals
    return Line(weight, member, artefact, top_k, temperature, *kinds)
