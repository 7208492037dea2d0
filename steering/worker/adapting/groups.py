"""Which tokens of a stream batch use which adapters, as groups for the adapter kernel.

Letters: Q requests of this step, T tokens of the stream batch, n tokens of a group, R columns of a
set of adapters (`adapters.sets`), M members of a routed artefact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from adapters.kernels.gated import Group, Route, Tally
from adapters.sets import Block, Layout
from steering.plan import AdapterUse
from steering.worker.plan.batches import Int64

Float32 = npt.NDArray[np.float32]


class Routed(NamedTuple):
    """Where the tokens of a step were routed.

    Args:
        stream: the stream that ran.
        digest: of the pack.
        counts: [Q, M] int64, summed over the layers.
    """

    stream: str
    digest: str
    counts: torch.Tensor


class _Uses(NamedTuple):
    """Who uses one set in a stream batch. Letter: U users, the requests that have the set.

    Args:
        stream: the stream that runs.
        uses: [U] digest → use, of each user.
        user: [n] index of each token's user.
        requests: [n] index of each token's request.
        device: of the group's tensors.
    """

    stream: str
    uses: Sequence[Mapping[str, AdapterUse]]
    user: Int64
    requests: Int64
    device: torch.device


@lru_cache(4096)
def digests(layouts: tuple[Layout, ...]) -> frozenset[str]:
    """Of the artefacts of a set."""
    return frozenset(block.digest for layout in layouts for block in layout.blocks)


@dataclass(frozen=True, slots=True)
class Adapted:
    """The adapters of this step's requests.

    Args:
        uses: [Q] the requests' adapters.
        sets: [Q] the id of each request's set, 0 for none.
        slots: set id → slot, of the sets that are in one.
        layouts: set id → owner → layout.
        counting: whether routes are counted, for reports.
        routed: what was counted; grows with every stream that runs.
    """

    uses: Sequence[tuple[AdapterUse, ...]]
    sets: Int64
    slots: Mapping[int, int]
    layouts: Mapping[int, Mapping[str, Layout]]
    counting: bool = False
    routed: list[Routed] = field(default_factory=list)

    def check(self) -> None:
        """Whether every adapter that a request uses is in the slot of its set.

        Raises:
            RuntimeError: one is not.
        """
        for uses, set_id in zip(self.uses, self.sets.tolist(), strict=True):
            if not uses:
                continue
            if set_id not in self.slots or set_id not in self.layouts:
                raise RuntimeError(f"a request's adapters are in no slot (set {set_id})")
            held = digests(tuple(self.layouts[set_id].values()))
            if missing := {use.digest for use in uses} - held:
                raise RuntimeError(f"set {set_id} lacks adapters of its request: {missing}")

    def groups(
        self, stream: str, owner: str, token_requests: Int64, total: int, device: torch.device
    ) -> tuple[Group, ...]:
        """The groups of one stream batch.

        Args:
            stream: the stream that runs.
            owner: the stream whose layers it runs: itself, or the original of a twin.
            token_requests: [T] index of each token's request.
            total: tokens that the stream runs, padding included, ≥ T.
            device: of the groups' tensors.
        """
        found = []
        for set_id in np.unique(self.sets[token_requests]):
            layout = self.layouts[int(set_id)].get(owner) if set_id else None
            if layout is None:
                continue
            users = np.flatnonzero(self.sets == set_id)
            uses = [
                {use.digest: use for use in self.uses[q] if use.stream == stream and use.weight}
                for q in users
            ]
            user = np.full(self.sets.size, -1)
            user[users] = [i if use else -1 for i, use in enumerate(uses)]
            own = user[token_requests]
            tokens = np.flatnonzero(own >= 0)
            if tokens.size:
                slot = self.slots[int(set_id)]
                chosen = None if tokens.size == total else tokens
                group = _Uses(stream, uses, own[tokens], token_requests[tokens], device)
                found.append(self._group(group, slot, layout, chosen))
        return tuple(found)

    def _group(self, use: _Uses, slot: int, layout: Layout, tokens: Int64 | None) -> Group:
        per_user = np.zeros((len(use.uses), layout.columns), np.float32)
        routes = []
        for block in layout.blocks:
            own = [u.get(block.digest) for u in use.uses]
            if block.gate is None:
                per_user[:, block.columns] = [[u.weight if u else 0.0] for u in own]
            elif any(own[i] for i in np.unique(use.user)):
                per_user[:, block.columns] = 1.0
                routes.append(self._route(use, block, block.gate, own))
        gate = per_user[use.user]
        return Group(
            slot,
            None if tokens is None else torch.from_numpy(tokens).to(use.device),
            layout.columns,
            layout.rows,
            None if (gate == 1).all() else torch.from_numpy(gate).to(use.device),
            tuple(routes),
            layout.constants,
            layout.diagonals,
        )

    def _route(self, use: _Uses, block: Block, row: int, own: Sequence[AdapterUse | None]) -> Route:
        """The learned gates of one block; users that do not use it get the weight 0."""
        weight = np.array([u.weight if u else 0.0 for u in own], np.float32)[use.user]
        top_k = np.array([u.top_k if u else 1 for u in own], np.int64)[use.user]
        temperature = np.array([u.temperature if u else 1.0 for u in own], np.float32)[use.user]
        member = np.repeat(np.arange(len(block.ranks)), block.ranks)
        tally, device = None, use.device
        if self.counting:
            shape = len(self.uses), len(block.ranks)
            counts = torch.zeros(shape, dtype=torch.int64, device=device)
            tally = Tally(torch.from_numpy(use.requests).to(device), counts)
            self.routed.append(Routed(use.stream, block.digest, counts))
        ones = torch.tensor(block.ones, dtype=torch.int64, device=device).T if block.ones else None
        return Route(
            block.products,
            slice(row, row + len(block.ranks)),
            torch.from_numpy(member).to(device),
            torch.from_numpy(weight).to(device),
            torch.from_numpy(top_k).to(device),
            int(top_k.max()),
            torch.from_numpy(temperature).to(device),
            tally,
            None if ones is None else (ones[0], ones[1]),
        )
