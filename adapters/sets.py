"""Sets: the adapters that one request uses, stacked along the rank so that one engine slot holds
them all. Weights, k and T are the request's; they are no part of the set, so requests that weigh
the same adapters differently share its slot. Needs no torch.

Rank indices of one model (`owner`) in a set, R = P + C + D columns and G gate rows:

    0 … P       products: the members' ranks, artefact by artefact; the activation is a · x
    P … P+C     constants: the activation is 1, so a column of B is what is added
    P+C … R     diagonals: the activation is 1, and a column of B multiplies the layer's output
    R … R+G     the rows of W_gate of the routed artefacts; only A has them, so that one product
                with x gives both the shrunk activations and the gates' scores

A has rows of zeros for constants and diagonals, so that its rows are B's columns; no kernel
multiplies them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import count

import msgspec

from adapters.formats.artefact import Artefact

IDS = range(1 << 20, 1 << 31)
"""What engines call sets: vLLM's own ids begin at 1, and its Model Runner V2 keeps ids in int32."""


class Member(msgspec.Struct, frozen=True, order=True):
    """One artefact of a set.

    Args:
        owner: the model whose layers it changes: `base` or a companion stream, the original
            where a stream is another's twin.
        digest: of its content.
        folder: where it lies; immutable as long as the set is in use.
        ranks: per member of the artefact, its largest rank; 0 if it has no products.
        routed: whether it has gates.
        constants: per member, whether it adds a constant in some layer; empty if none does.
        diagonals: per member, whether it multiplies the output of some layer; empty if none does.
    """

    owner: str
    digest: str
    folder: str
    ranks: tuple[int, ...]
    routed: bool
    constants: tuple[bool, ...] = ()
    diagonals: tuple[bool, ...] = ()

    @classmethod
    def of(cls, artefact: Artefact, digest: str, owner: str) -> Member:
        """An artefact that shall change the model `owner`."""
        return cls(
            owner,
            digest,
            str(artefact.folder),
            artefact.ranks,
            bool(artefact.gates),
            artefact.constants,
            artefact.diagonals,
        )


class Block(msgspec.Struct, frozen=True):
    """Where an artefact lies among the rank indices of its owner.

    Args:
        digest: of the artefact.
        start: its first product.
        ranks: per member of the artefact, how many products; side by side from `start`.
        gate: its first gate row, None if it is not routed.
        constants: per member, the column of its constant, None if it has none; empty if none has.
        diagonals: the same of its diagonal.
    """

    digest: str
    start: int
    ranks: tuple[int, ...]
    gate: int | None
    constants: tuple[int | None, ...] = ()
    diagonals: tuple[int | None, ...] = ()

    @property
    def products(self) -> slice:
        """The columns of its products."""
        return slice(self.start, self.start + sum(self.ranks))

    @property
    def ones(self) -> tuple[tuple[int, int], ...]:
        """(column, member) of its constants and diagonals."""
        kinds = self.constants, self.diagonals
        return tuple((c, m) for kind in kinds for m, c in enumerate(kind) if c is not None)

    @property
    def of_columns(self) -> list[int]:
        """The member of each of `columns`."""
        products = [m for m, rank in enumerate(self.ranks) for _ in range(rank)]
        return [*products, *(m for _, m in self.ones)]

    @property
    def columns(self) -> list[int]:
        """All its columns."""
        return [*range(self.products.start, self.products.stop), *(c for c, _ in self.ones)]


class Layout(msgspec.Struct, frozen=True):
    """The rank indices of one model in a set.

    Args:
        blocks: in the order of their products.
        products: P.
        constants: C.
        diagonals: D.
        gates: G.
    """

    blocks: tuple[Block, ...] = ()
    products: int = 0
    constants: int = 0
    diagonals: int = 0
    gates: int = 0

    @property
    def sums(self) -> int:
        """P + C, the first diagonal."""
        return self.products + self.constants

    @property
    def columns(self) -> int:
        """R = P + C + D."""
        return self.products + self.constants + self.diagonals

    @property
    def rows(self) -> int:
        """R + G."""
        return self.columns + self.gates


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
        products = sum(sum(m.ranks) for m in members)
        constants = sum(sum(m.constants) for m in members)
        diagonals = sum(sum(m.diagonals) for m in members)
        # Where the next artefact's indices of each kind begin.
        product, constant, diagonal = 0, products, products + constants
        first = gate = products + constants + diagonals
        blocks = []
        for m in members:
            columns = _columns(m.constants, constant), _columns(m.diagonals, diagonal)
            blocks.append(Block(m.digest, product, m.ranks, gate if m.routed else None, *columns))
            product += sum(m.ranks)
            constant += sum(m.constants)
            diagonal += sum(m.diagonals)
            gate += len(m.ranks) if m.routed else 0
        return Layout(tuple(blocks), products, constants, diagonals, gate - first)

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
        """What an engine calls it while it holds it, one of `IDS`; kept nowhere else.

        So few bits are not unique: who holds sets holds no two of the same id at a time.
        """
        return IDS[int(self.name, 16) % len(IDS)]

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


def _columns(present: Sequence[bool], start: int) -> tuple[int | None, ...]:
    """Consecutive columns for the members that have one."""
    numbers = count(start)
    return tuple(next(numbers) if p else None for p in present)
