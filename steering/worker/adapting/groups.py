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
from adapters.kernels.judging import Gated, Judge, LoadedCondition, PromptState, Reading
from adapters.sets import Block, Layout
from adapters.where import Where
from steering.plan import AdapterUse
from steering.worker.plan.batches import Bool, Int64

Float32 = npt.NDArray[np.float32]

Conditions = Mapping[int, Mapping[str, Mapping[str, LoadedCondition]]]
"""Set id → owner → digest → when that artefact acts."""


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
        acts: digest → [n, M] whether each member acts on a token, of adapters that do not act
            everywhere.
    """

    stream: str
    uses: Sequence[Mapping[str, AdapterUse]]
    user: Int64
    requests: Int64
    device: torch.device
    acts: Mapping[str, Bool]

    def acting(self, block: Block) -> Float32 | float:
        """[n, columns] 1 where a column of a block acts, 0 elsewhere; or 1 for all."""
        found = self.acts.get(block.digest)
        return 1.0 if found is None else found[:, block.of_columns].astype(np.float32)


@lru_cache(4096)
def digests(layouts: tuple[Layout, ...]) -> frozenset[str]:
    """Digests of the artefacts of a set."""
    return frozenset(block.digest for layout in layouts for block in layout.blocks)


@lru_cache(64)
def _wheres(uses: tuple[tuple[AdapterUse, ...], ...]) -> tuple[Where, ...]:
    return tuple(sorted({where for own in uses for use in own for where in use.where}, key=repr))


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
        conditions: of the sets.
        prompts: (request, stream, digest) → what is known of its prompt; grows.
        request_ids: [Q].
    """

    uses: Sequence[tuple[AdapterUse, ...]]
    sets: Int64
    slots: Mapping[int, int]
    layouts: Mapping[int, Mapping[str, Layout]]
    counting: bool = False
    routed: list[Routed] = field(default_factory=list)
    conditions: Conditions = field(default_factory=dict)
    prompts: dict[tuple[str, str, str], PromptState] = field(default_factory=dict)
    request_ids: Sequence[str] = ()

    @property
    def wheres(self) -> tuple[Where, ...]:
        """What the requests' adapters say of positions, each once; empty: all act everywhere."""
        return _wheres(self.uses if isinstance(self.uses, tuple) else tuple(self.uses))

    @property
    def conditional(self) -> bool:
        """Whether any request of the step has a conditional adapter."""
        return bool(self.conditions) and any(
            conditions
            for set_id in np.unique(self.sets)
            for conditions in self.conditions.get(int(set_id), {}).values()
        )

    def judges(
        self,
        stream: str,
        owner: str,
        requests: Int64,
        groups: Sequence[Group],
        ahead: Int64,
        lengths: Int64,
        device: torch.device,
    ) -> list[Judge]:
        """The conditional adapters of one stream batch.

        Args:
            stream: the stream that runs.
            owner: the stream whose layers it runs.
            requests: [T] index of each token's request.
            groups: of the batch.
            ahead: [T] position − L where the prompt is read, 0 behind it.
            lengths: [Q] L, of each request's prompt in this stream.
            device: of the stream.
        """
        found = []
        for q in np.unique(requests):
            set_id = int(self.sets[q])
            conditions = self.conditions.get(set_id, {}).get(owner, {})
            for use in self.uses[q]:
                if use.stream != stream or use.digest not in conditions:
                    continue
                condition, prompt, reading = conditions[use.digest], None, None
                if condition.by_prompt:
                    key = self.request_ids[q], stream, use.digest
                    prompt = self.prompts.setdefault(key, PromptState())
                    reading = _reading(prompt, requests == q, ahead, int(lengths[q]), device)
                tokens, gated = self._decided(set_id, owner, use, int(q), requests, groups)
                at = torch.from_numpy(tokens).to(device)
                found.append(Judge(condition, at, gated, prompt, reading))
        return found

    def _decided(
        self,
        set_id: int,
        owner: str,
        use: AdapterUse,
        q: int,
        requests: Int64,
        groups: Sequence[Group],
    ) -> tuple[Int64, Gated | None]:
        """([n] tokens of request q, their gates) on which an adapter acts if its condition is met;
        none where it acts on no token of the pass.
        """
        slot = self.slots[set_id]
        group = next((one for one in groups if one.slot == slot), None)
        if group is None:
            return np.empty(0, np.int64), None
        assert group.gate is not None
        every = np.arange(requests.size) if group.tokens is None else group.tokens.cpu().numpy()
        rows = np.flatnonzero(requests[every] == q)
        blocks = self.layouts[set_id][owner].blocks
        own = next(block for block in blocks if block.digest == use.digest)
        columns = torch.tensor(own.columns, device=group.gate.device)
        at = torch.from_numpy(rows).to(group.gate.device)
        weight = group.gate[at[:, None], columns]
        return every[rows], Gated(group.gate, at, columns, weight) if rows.size else None

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

    def acting(
        self, uses: Sequence[Mapping[str, AdapterUse]], user: Int64, active: Bool
    ) -> dict[str, Bool]:
        """Digest → [n, M] whether each of its members acts on a token, of some users.

        Args:
            uses: [U] digest → use.
            user: [n] index of each token's user.
            active: [n, W] whether each of `wheres` holds.
        """
        found: dict[str, Bool] = {}
        number = {where: i for i, where in enumerate(self.wheres)}
        for i, own in enumerate(uses):
            rows = user == i
            for digest, use in own.items():
                if not use.where:
                    continue
                members = max(len(use.where), self._members(digest))
                at = [number[use.where[m if len(use.where) > 1 else 0]] for m in range(members)]
                acts = found.setdefault(digest, np.ones((user.size, members), bool))
                acts[rows] = active[rows][:, at]
        return found

    def _members(self, digest: str) -> int:
        layouts = (one for owners in self.layouts.values() for one in owners.values())
        return next(len(b.ranks) for one in layouts for b in one.blocks if b.digest == digest)

    def groups(
        self,
        stream: str,
        owner: str,
        token_requests: Int64,
        total: int,
        device: torch.device,
        active: Bool | None = None,
    ) -> tuple[Group, ...]:
        """The groups of one stream batch.

        Args:
            stream: the stream that runs.
            owner: the stream whose layers it runs: itself, or the original of a twin.
            token_requests: [T] index of each token's request.
            total: tokens that the stream runs, padding included, ≥ T.
            device: of the groups' tensors.
            active: [T, W] whether each of `wheres` holds for a token; None: all do.
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
            acts: dict[str, Bool] = {}
            if active is not None and any(u.where for use in uses for u in use.values()):
                acts = self.acting(uses, own, active)
                for i, use in enumerate(uses):
                    rows = own == i
                    if use and all(digest in acts for digest in use):
                        some = np.any([acts[digest][rows].any(1) for digest in use], axis=0)
                        own[np.flatnonzero(rows)[~some]] = -1
            tokens = np.flatnonzero(own >= 0)
            acts = {digest: one[tokens] for digest, one in acts.items()}
            if tokens.size:
                slot = self.slots[int(set_id)]
                chosen = None if tokens.size == total else tokens
                group = _Uses(stream, uses, own[tokens], token_requests[tokens], device, acts)
                judged = bool(self.conditions.get(int(set_id), {}).get(owner))
                found.append(self._group(group, slot, layout, chosen, judged=judged))
        return tuple(found)

    def _group(
        self, use: _Uses, slot: int, layout: Layout, tokens: Int64 | None, *, judged: bool
    ) -> Group:
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
        for block in layout.blocks:
            if block.gate is None and block.digest in use.acts:
                gate[:, block.columns] *= use.acting(block)
        return Group(
            slot,
            None if tokens is None else torch.from_numpy(tokens).to(use.device),
            layout.columns,
            layout.rows,
            None if (gate == 1).all() and not judged else torch.from_numpy(gate).to(use.device),
            tuple(routes),
            layout.constants,
            layout.diagonals,
            judged,
        )

    def _route(self, use: _Uses, block: Block, row: int, own: Sequence[AdapterUse | None]) -> Route:
        """The learned gates of one block; where it is not used it gets the weight 0."""
        weight = np.array([u.weight if u else 0.0 for u in own], np.float32)[use.user]
        requests = use.requests
        if block.digest in use.acts:
            here = use.acts[block.digest][:, 0]
            # What is counted of the other tokens goes behind the last request's.
            weight, requests = weight * here, np.where(here, requests, len(self.uses))
        top_k = np.array([u.top_k if u else 1 for u in own], np.int64)[use.user]
        temperature = np.array([u.temperature if u else 1.0 for u in own], np.float32)[use.user]
        member = np.repeat(np.arange(len(block.ranks)), block.ranks)
        tally, device = None, use.device
        if self.counting:
            shape = len(self.uses) + 1, len(block.ranks)
            counts = torch.zeros(shape, dtype=torch.int64, device=device)
            tally = Tally(torch.from_numpy(requests).to(device), counts)
            self.routed.append(Routed(use.stream, block.digest, counts[:-1]))
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


def _reading(
    prompt: PromptState, own: Bool, ahead: Int64, length: int, device: torch.device
) -> Reading | None:
    """The prompt's tokens that a pass reads of a request; None: none.

    Args:
        prompt: what is known of it; goes on.
        own: [T] whether a token is the request's.
        ahead: [T] as for `Adapted.judges`.
        length: L.
        device: of the stream.

    Raises:
        RuntimeError: tokens were left out; the request must not run on what is known of others.
    """
    tokens = np.flatnonzero(own & (ahead < 0))
    if not tokens.size:
        return None
    first = int(ahead[tokens[0]]) + length
    if first not in (0, prompt.seen):
        raise RuntimeError(f"a condition has read {prompt.seen} tokens of a prompt, not {first}")
    prompt.seen = first + tokens.size
    ends = prompt.seen == length
    at = torch.from_numpy(tokens).to(device)
    return Reading(prompt, at, first == 0, length if ends else 0)
