"""Lines of requests against a plain mirror: every token gets its own request's gates."""

from __future__ import annotations

import random

import numpy as np
import torch

from adapters.kernels.lines import CONSTANT, Line
from adapters.sets import AdapterSet
from steering.plan import AdapterUse
from steering.worker.adapting.groups import Adapted
from steering.worker.adapting.lines import stream_lines
from tests.steering.worker.test_adapting import SETS, SLOTS, STREAMS, random_uses

Gates = list[tuple[float, tuple[int, float, tuple[int, ...]] | None]]
"""Per column its weight and, where its gate is learned, k, T and the gate rows it competes with,
its own first."""


def gates_of(line: Line) -> Gates:
    found: Gates = []
    for weight, member in zip(line.weight.tolist(), line.member.tolist(), strict=True):
        learned = None
        if member != CONSTANT:
            rivals = np.flatnonzero(line.artefact == line.artefact[member]).tolist()
            rivals.remove(member)
            k, temperature = int(line.top_k[member]), float(line.temperature[member])
            learned = k, temperature, (member, *rivals)
        found.append((weight, learned))
    return found


def expected(found: AdapterSet, owner: str, uses: dict[str, AdapterUse]) -> Gates:
    kinds: tuple[Gates, Gates, Gates] = [], [], []  # products, constants, diagonals
    first = 0
    for member in found.members:
        if member.owner != owner:
            continue
        use = uses.get(member.digest)
        count = len(member.ranks)
        none = (0,) * count
        for j, sizes in enumerate(
            zip(member.ranks, member.constants or none, member.diagonals or none, strict=True)
        ):
            learned = None
            if member.routed:
                others = [first + i for i in range(count) if i != j]
                k, temperature = (use.top_k, use.temperature) if use else (0, 1.0)
                learned = k, temperature, (first + j, *others)
            for kind, size in zip(kinds, sizes, strict=True):
                kind += [(use.weight if use else 0.0, learned)] * size
        first += count if member.routed else 0
    return [gate for kind in kinds for gate in kind]


def test_every_token_gets_its_own_requests_gates() -> None:
    rng = random.Random(2)
    layouts = {i: {o: s.layout(o) for o in s.owners} for i, s in SETS.items()}
    seen = 0
    for _ in range(300):
        count = rng.randint(1, 6)
        sets = np.array([rng.choice([0, *SETS]) for _ in range(count)], np.int64)
        uses = [random_uses(rng, SETS[int(s)]) if s else () for s in sets]
        requests = np.repeat(np.arange(count), [rng.randint(0, 4) for _ in range(count)])
        for stream, owner in STREAMS.items():
            found = stream_lines(Adapted(uses, sets, SLOTS, layouts), stream, owner, requests)
            for t, q in enumerate(requests):
                own = {u.digest: u for u in uses[q] if u.stream == stream and u.weight}
                number = -1 if found is None else int(found.lines.tokens[t])
                assert (number >= 0) == bool(own)
                if found is None or number < 0:
                    continue
                assert found.requests[number] == q
                assert found.lines.slots[number] == SLOTS[int(sets[q])]
                line = found.lines.lines[number]
                assert gates_of(line) == expected(SETS[int(sets[q])], owner, own)
                layout = SETS[int(sets[q])].layout(owner)
                assert (line.products, line.sums) == (layout.products, layout.sums)
                seen += 1
    assert seen > 500


def test_a_request_without_tokens_has_no_line() -> None:
    uses = [(AdapterUse("a"),), (AdapterUse("a"),)]
    layouts = {100: {"base": SETS[100].layout("base")}}
    sets = np.array([100, 100])
    adapted = Adapted(uses, sets, SLOTS, layouts)
    found = stream_lines(adapted, "base", "base", np.array([1, 1]))
    assert found is not None and found.requests == (1,)
    assert found.lines.tokens.tolist() == [0, 0]
    # The same use of the same set is made once.
    both = stream_lines(adapted, "base", "base", np.array([0, 1]))
    assert both is not None and both.lines.lines[0] is found.lines.lines[0]


def test_counts_go_to_the_requests_that_use_the_pack() -> None:
    """Sets hold the pack at different gate rows; request 2 has it in its set without using it."""
    sets = np.array([102, 103, 103])
    uses = [
        (AdapterUse("pack", top_k=1),),
        (AdapterUse("pair", top_k=1), AdapterUse("pack", top_k=2)),
        (AdapterUse("b"),),
    ]
    layouts = {i: {"base": SETS[i].layout("base")} for i in (102, 103)}
    found = stream_lines(Adapted(uses, sets, SLOTS, layouts), "base", "base", np.arange(3))
    assert found is not None
    blocks = {b.digest: b for b in layouts[103]["base"].blocks}
    pack, pair = (blocks[d].gate or 0 for d in ("pack", "pair"))
    columns = layouts[103]["base"].columns
    counts = torch.zeros(5, 8, dtype=torch.int32)
    counts[0, :3] = torch.tensor([4, 0, 1])
    counts[1, pack - columns : pack - columns + 3] = torch.tensor([2, 3, 5])
    counts[1, pair - columns : pair - columns + 2] = torch.tensor([6, 7])
    routed = {"pack": torch.zeros(3, 3), "pair": torch.zeros(3, 2)}
    for place in found.places():
        there = torch.from_numpy(place.requests), torch.from_numpy(place.numbers)
        one = place.routed("base", 3, counts, *there)
        routed[one.digest] += one.counts
    assert {digest: counts.tolist() for digest, counts in routed.items()} == {
        "pack": [[4, 0, 1], [2, 3, 5], [0, 0, 0]],
        "pair": [[0, 0], [6, 7], [0, 0]],
    }
