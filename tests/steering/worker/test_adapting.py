"""Groups of tokens against a plain mirror: every token gets its own request's gates, once."""

from __future__ import annotations

import random

import numpy as np
import torch

from adapters.kernels.gated import Group
from adapters.sets import AdapterSet, Member
from steering.plan import AdapterUse
from steering.worker.adapting.groups import Adapted

CPU = torch.device("cpu")
STREAMS = {"base": "base", "chat": "chat", "twin": "base"}

MEMBERS = [
    Member("base", "a", "", (2,), False),
    Member("base", "b", "", (3,), False),
    Member("base", "pack", "", (1, 2, 3), True),
    Member("base", "pair", "", (2, 2), True),
    Member("chat", "a", "", (2,), False),
    Member("base", "dora", "", (2,), False, (True,), (True,)),
    Member("base", "kinds", "", (1, 0, 2), True, (False, True, True), (True, True, False)),
    Member("chat", "ia3", "", (0,), False, (), (True,)),
]
SETS = {
    100 + i: AdapterSet.of(MEMBERS[m] for m in chosen)
    for i, chosen in enumerate(
        [[0], [0, 1], [2], [1, 2, 3], [0, 4], [4], [0, 2, 5], [1, 3, 5, 6], [0, 7]]
    )
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
    gates: list[list[float]] = [[], [], []]  # products, constants, diagonals
    routes = []
    start = 0
    for member in found.members:
        if member.owner != owner:
            continue
        use = uses.get(member.digest)
        gate = use.weight if use else 0.0
        if member.routed:
            # A routed block that nobody of the group uses is switched off by its constant.
            gate = 1.0 if start in routed else 0.0
            if use:
                routes.append((start, use.weight, use.top_k, use.temperature))
        sizes = sum(member.ranks), sum(member.constants), sum(member.diagonals)
        for kind, size in zip(gates, sizes, strict=True):
            kind += [gate] * size
        start += sizes[0]
    return tuple(gate for kind in gates for gate in kind), tuple(routes)


def test_learned_gates_of_constants_and_diagonals() -> None:
    (found,) = (s for s in SETS.values() if len(s.members) == 4 and s.members[2].digest == "kinds")
    sets = np.array([next(i for i, s in SETS.items() if s is found)])
    layouts = {int(sets[0]): {"base": found.layout("base")}}
    uses = [(AdapterUse("kinds", top_k=2),)]
    adapted = Adapted(uses, sets, SLOTS, layouts)
    (group,) = adapted.groups("base", "base", np.zeros(3, np.int64), 3, CPU)
    # b 3, dora 2, kinds 1 + 0 + 2 and pair 2 + 2 products; dora, kinds 1, 2 constants; then the
    # diagonals of dora, kinds 0, 1.
    assert (group.products, group.sums, group.columns, group.rows) == (12, 15, 18, 23)
    (route,) = group.routes
    assert route.columns == slice(5, 8) and route.member.tolist() == [0, 2, 2]
    assert route.ones is not None
    assert [part.tolist() for part in route.ones] == [[13, 14, 16, 17], [1, 2, 0, 1]]
    assert group.gate is not None
    assert group.gate[0].nonzero().flatten().tolist() == [5, 6, 7, 13, 14, 16, 17]


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
