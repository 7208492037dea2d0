"""Groups of tokens against a plain mirror: every token gets its own request's gates, once."""

from __future__ import annotations

import random

import numpy as np
import torch

from adapters.kernels.gated import Group
from adapters.sets import AdapterSet, Member
from steering.plan import AdapterUse
from steering.worker.adapting import Adapted

CPU = torch.device("cpu")
STREAMS = {"base": "base", "chat": "chat", "twin": "base"}

MEMBERS = [
    Member("base", "a", "", (2,), False),
    Member("base", "b", "", (3,), False),
    Member("base", "pack", "", (1, 2, 3), True),
    Member("base", "pair", "", (2, 2), True),
    Member("chat", "a", "", (2,), False),
]
SETS = {
    100 + i: AdapterSet.of(MEMBERS[m] for m in chosen)
    for i, chosen in enumerate([[0], [0, 1], [2], [1, 2, 3], [0, 4], [4]])
}
SLOTS = {set_id: slot for slot, set_id in enumerate(reversed(SETS))}


def random_uses(rng: random.Random, found: AdapterSet) -> tuple[AdapterUse, ...]:
    """Uses of some of a set's members on streams that run them."""
    uses = []
    for member in found.members:
        for stream, owner in STREAMS.items():
            if owner == member.owner and rng.random() < 0.6:
                weight = rng.choice([0.0, 1.0, -0.5])
                top_k = rng.randint(1, len(member.ranks)) if member.routed else 0
                temperature = rng.choice([1.0, 15.0]) if member.routed else 1.0
                uses.append(AdapterUse(member.digest, stream, weight, top_k, temperature))
    return tuple(uses)


def gates_of(
    group: Group, n: int
) -> list[tuple[tuple[float, ...], tuple[tuple[object, ...], ...]]]:
    """Per token of a group: its constant gates, and (first column, weight, k, T) of its routes."""
    gate = np.ones((n, group.columns)) if group.gate is None else group.gate.numpy()
    return [
        (
            tuple(gate[t]),
            tuple(
                (r.columns.start, float(r.weight[t]), int(r.top_k[t]), float(r.temperature[t]))
                for r in group.routes
                if r.weight[t]
            ),
        )
        for t in range(n)
    ]


def expected(
    found: AdapterSet, owner: str, uses: dict[str, AdapterUse], routed: set[int]
) -> tuple[tuple[float, ...], tuple[tuple[object, ...], ...]]:
    """What a token must get; `routed` are the first columns of the group's routes."""
    gate: list[float] = []
    routes = []
    for block in found.layout(owner).blocks:
        use = uses.get(block.digest)
        if block.gate is None:
            gate += [use.weight if use else 0.0] * sum(block.ranks)
            continue
        # A routed block that nobody of the group uses is switched off by its constant.
        gate += [1.0 if block.start in routed else 0.0] * sum(block.ranks)
        if use:
            routes.append((block.start, use.weight, use.top_k, use.temperature))
    return tuple(gate), tuple(routes)


def test_every_token_gets_its_own_requests_gates() -> None:
    rng = random.Random(1)
    seen_whole = seen_routes = 0
    for _ in range(300):
        count = rng.randint(1, 6)
        sets = np.array([rng.choice([0, *SETS]) for _ in range(count)], np.int64)
        uses = [random_uses(rng, SETS[int(s)]) if s else () for s in sets]
        lengths = np.array([rng.randint(0, 4) for _ in range(count)])
        requests = np.repeat(np.arange(count), lengths)
        layouts = {i: {o: s.layout(o) for o in s.owners} for i, s in SETS.items()}
        total = requests.size + rng.choice([0, 0, 3])
        for stream, owner in STREAMS.items():
            groups = Adapted(uses, sets, SLOTS, layouts).groups(stream, owner, requests, total, CPU)
            adapted: set[int] = set()
            for group in groups:
                (set_id,) = (i for i, slot in SLOTS.items() if slot == group.slot)
                tokens = range(total) if group.tokens is None else group.tokens.tolist()
                seen_whole += group.tokens is None
                seen_routes += len(group.routes)
                routed = {r.columns.start for r in group.routes}
                for t, got in zip(tokens, gates_of(group, len(tokens)), strict=True):
                    assert sets[requests[t]] == set_id
                    own = {
                        u.digest: u for u in uses[requests[t]] if u.stream == stream and u.weight
                    }
                    assert own
                    assert got == expected(SETS[set_id], owner, own, routed)
                    assert t not in adapted
                    adapted.add(t)
            for t in set(range(requests.size)) - adapted:
                assert not any(u.stream == stream and u.weight for u in uses[requests[t]])
    assert seen_whole > 20 and seen_routes > 100
