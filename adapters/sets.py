"""Sets: the adapters that one request uses, stacked along the rank so that one engine slot holds
them all. Weights, k and T are the request's; they are no part of the set, so requests that weigh
the same adapters differently share its slot. Needs no torch.

Rank indices of one model (`owner`) in a set, R columns and G gate rows:

    0 … R   the members' ranks, artefact by artefact; A and B have them
    R … R+G the rows of W_gate of the routed artefacts; only A has them, so that one product with
            x gives both the shrunk activations and the gates' scores
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from adapters.formats.artefact import Artefact


class Member(msgspec.Struct, frozen=True, order=True):
    """One artefact of a set.

    Args:
        owner: the model whose layers it changes: `base` or a companion stream, the original
            where a stream is another's twin.
        digest: of its content.
        folder: where it lies; immutable as long as the set is in use.
        ranks: per member of the artefact, its largest rank.
        routed: whether it has gates.
    """

    owner: str
    digest: str
    folder: str
    ranks: tuple[int, ...]
    routed: bool

    @classmethod
    def of(cls, artefact: Artefact, digest: str, owner: str) -> Member:
        """An artefact that shall change the model `owner`."""
        return cls(owner, digest, str(artefact.folder), artefact.ranks, bool(artefact.gates))


class Block(msgspec.Struct, frozen=True):
    """Where an artefact lies among the rank indices of its owner.

    Args:
        digest: of the artefact.
        start: its first column.
        ranks: per member of the artefact, how many columns.
        gate: its first gate row, None if it is not routed.
    """

    digest: str
    start: int
    ranks: tuple[int, ...]
    gate: int | None

    @property
    def stop(self) -> int:
        """Its last column + 1."""
        return self.start + sum(self.ranks)


class Layout(msgspec.Struct, frozen=True):
    """The rank indices of one model in a set.

    Args:
        blocks: in the order of their columns.
        columns: R.
        rows: R + G.
    """

    blocks: tuple[Block, ...] = ()
    columns: int = 0
    rows: int = 0


class AdapterSet(msgspec.Struct, frozen=True):
    """Adapters that are stacked in one slot.

    Args:
        members: sorted, no two alike; see `AdapterSet.of`.
    """

    members: tuple[Member, ...]

    @classmethod
    def of(cls, members: Iterable[Member]) -> AdapterSet:
        """The set of some members, in any order."""
        unique = {(m.owner, m.digest): m for m in members}
        return cls(tuple(unique[key] for key in sorted(unique)))

    @property
    def name(self) -> str:
        """Names the set's content: 32 hex digits."""
        state = [(m.owner, m.digest) for m in self.members]
        return hashlib.sha256(repr(state).encode()).hexdigest()[:32]

    def layout(self, owner: str) -> Layout:
        """The rank indices of one model."""
        members = [m for m in self.members if m.owner == owner]
        columns = sum(sum(m.ranks) for m in members)
        blocks, start, gate = [], 0, columns
        for m in members:
            blocks.append(Block(m.digest, start, m.ranks, gate if m.routed else None))
            start += sum(m.ranks)
            gate += len(m.ranks) if m.routed else 0
        return Layout(tuple(blocks), columns, gate)

    @property
    def owners(self) -> tuple[str, ...]:
        """The models that the set changes."""
        return tuple(sorted({m.owner for m in self.members}))

    @property
    def rank(self) -> int:
        """Rank indices that its slot needs; at most the server's `max_rank`."""
        return max(self.layout(owner).rows for owner in self.owners)

    @property
    def set_id(self) -> int:
        """What the engine calls it, ≥ 2²⁰: vLLM's own ids begin at 1."""
        return int(self.name[:15], 16) + (1 << 20)

    def lora_request(self) -> dict[str, str | int]:
        """Keyword arguments of vLLM's `LoRARequest` for this set.

        The same set gives the same request in every process: the id is part of the name's hash,
        and the "path" is the set itself, so that the worker can load it again at any time and
        vLLM's prefix cache tells sets apart.
        """
        return {
            "lora_name": self.name,
            "lora_int_id": self.set_id,
            "lora_path": msgspec.json.encode(self).decode(),
        }

    @classmethod
    def from_path(cls, path: str) -> AdapterSet:
        """The set whose `lora_request` has this path."""
        return msgspec.json.decode(path, type=cls)
