"""Which tokens of a stream batch use which adapters, as groups for the adapter kernel.

Letters: Q requests of this step, T tokens of the stream batch, n tokens of a group, R columns of a
set of adapters (`adapters.sets`), M members of a routed artefact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from adapters.kernels.gated import Group, Route, Tally
from adapters.sets import Block, Layout
from steering.plan import AdapterUse
from steering.worker.batches import Int64

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
            uses = [
                {use.digest: use for use in self.uses[q] if use.stream == stream and use.weight}
                if self.sets[q] == set_id
                else {}
                for q in range(len(self.uses))
            ]
            used = np.array([bool(u) for u in uses])
            tokens = np.flatnonzero(used[token_requests])
            if tokens.size:
                slot = self.slots[int(set_id)]
                chosen = None if tokens.size == total else tokens
                own = token_requests[tokens]
                found.append(self._group(stream, slot, layout, uses, own, chosen, device))
        return tuple(found)

    def _group(
        self,
        stream: str,
        slot: int,
        layout: Layout,
        uses: Sequence[Mapping[str, AdapterUse]],
        requests: Int64,
        tokens: Int64 | None,
        device: torch.device,
    ) -> Group:
        """The group of some tokens, `requests` [n] being theirs."""
        per_request = np.zeros((len(uses), layout.columns), np.float32)
        routes = []
        for block in layout.blocks:
            own = [use.get(block.digest) for use in uses]
            columns = slice(block.start, block.stop)
            if block.gate is None:
                per_request[:, columns] = [[u.weight if u else 0.0] for u in own]
            elif any(own[q] for q in np.unique(requests)):
                per_request[:, columns] = 1.0
                routes.append(self._route(stream, block, block.gate, own, requests, device))
        gate = per_request[requests]
        return Group(
            slot,
            None if tokens is None else torch.from_numpy(tokens).to(device),
            layout.columns,
            layout.rows,
            None if (gate == 1).all() else torch.from_numpy(gate).to(device),
            tuple(routes),
        )

    def _route(
        self,
        stream: str,
        block: Block,
        row: int,
        own: Sequence[AdapterUse | None],
        requests: Int64,
        device: torch.device,
    ) -> Route:
        """The learned gates of one block; requests that do not use it get the weight 0."""
        weight = np.array([u.weight if u else 0.0 for u in own], np.float32)[requests]
        top_k = np.array([u.top_k if u else 1 for u in own], np.int64)[requests]
        temperature = np.array([u.temperature if u else 1.0 for u in own], np.float32)[requests]
        member = np.repeat(np.arange(len(block.ranks)), block.ranks)
        tally = None
        if self.counting:
            counts = torch.zeros(len(own), len(block.ranks), dtype=torch.int64, device=device)
            tally = Tally(torch.from_numpy(requests).to(device), counts)
            self.routed.append(Routed(stream, block.digest, counts))
        return Route(
            slice(block.start, block.stop),
            slice(row, row + len(block.ranks)),
            torch.from_numpy(member).to(device),
            torch.from_numpy(weight).to(device),
            torch.from_numpy(top_k).to(device),
            int(top_k.max()),
            torch.from_numpy(temperature).to(device),
            tally,
        )
