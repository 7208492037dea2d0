"""Candidates: who is asked what, in batches of bounded size; and how the answers ride and land."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steering.kernels.mix import Ends
from steering.kernels.reference import value_offsets
from steering.plan import Values
from steering.worker.plan.batches import Candidates
from steering.worker.plan.layout import EXTRA, Layout
from steering.worker.plan.step_plan import Classes, Valued
from steering.worker.readout.parts import Vocabulary
from steering.worker.readout.readout import Readout
from steering.worker.step.values import ValueStreams, broadcast, candidates_of, gather
from tests.steering.worker.schedules import scheduled

SIZE, END = 40, 3
OWN = 5
INDEX = {"good": 1, "kind": 2}


class World:
    """Two value streams whose value is a fixed function of stream, prefix length and token."""

    def __init__(self, chunk: int) -> None:
        self.ran: list[tuple[int, int]] = []
        self.streams = ValueStreams(
            heads={1: lambda h: h[:, 0], 2: lambda h: h[:, 0]},
            index=INDEX,
            read_as={1: None, 2: (torch.arange(SIZE) + 7) % SIZE},
            chunk=chunk,
            size=SIZE,
        )

    def value(self, stream: int, row: int, position: int, token: int) -> float:
        return float(np.sin(stream + 3 * row + 5 * position + 11 * token))

    def run(self, stream: int, tokens: torch.Tensor, batch: Candidates) -> torch.Tensor:
        self.ran.append((stream, batch.rows.size))
        rows = zip(batch.rows, batch.positions, tokens.tolist(), strict=True)
        return torch.tensor([[self.value(stream, *map(int, row))] for row in rows])

    def hidden(self, stream: int) -> torch.Tensor:
        return torch.arange(4.0)[:, None] / 10 + stream


@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_each_row_gets_its_own_candidates_values_and_rules(chunk: int, phased: bool) -> None:
    """With phases, what its line of control adds: which one it has is known on the device only."""
    world = World(chunk)
    asked = [
        (0, Values((("good", 2.0),), 5)),
        (2, Values((("good", 0.5), ("kind", -1.0)), 3, "zero")),
        (3, Values((("kind", 1.5),), 1, "model")),
        (4, Values((("kind", 1.0),), 99, "model")),
    ]
    valued = [Valued(row, ((row, values),)) for row, values in asked]
    line = None
    if phased:
        # Row 0 is in a phase with other values, row 2 in its own, row 3 in one without any.
        other = Values((("good", -0.7),), 2, "model")
        valued[0] = Valued(0, ((0, asked[0][1]), (5, other)))
        valued[1] = Valued(2, ((2, asked[1][1]), (6, Values((("kind", 3.0),), 1))))
        line, asked[0] = torch.tensor([5, 2, 7, 4]), (0, other)
        asked[2] = (3, Values((), 0))
    scores = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1))
    scores[0, END] = scores[1, END] = 99.0
    scores[1, OWN] = scores[0, OWN] = 98.0
    step = scheduled([0, 5, 6, 7, 8, 9], [0, 9, 20, 30, 40])
    offsets = np.zeros((5, 3), np.int32)
    offsets[2, 2] = 4
    table = torch.zeros(2, SIZE, dtype=torch.bool)
    table[:, END] = table[1, OWN] = True
    ends = Ends(table, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    noted: list[tuple[int, list[int]]] = []

    def note(stream: int, numbers: torch.Tensor, rows: Any) -> None:
        assert numbers.isfinite().all() and len(numbers) == len(rows)
        noted.append((stream, rows.tolist()))

    plan = world.streams.plan(valued, step, offsets, 8)
    staged = [torch.from_numpy(array) for array in plan.arrays]
    found = world.streams.add(plan, staged, line, scores, world.hidden, world.run, ends, note)
    assert noted == [(1, [0, 2]), (2, [2, 3, 4])]
    for j, (row, values) in enumerate(asked):
        best = scores[j].argsort(descending=True)[: values.top_k]
        assert found.ids[j, : values.top_k].tolist() == best.tolist()
        want = np.zeros(best.numel())
        for name, beta in values.strengths:
            s = INDEX[name]
            end = int(step.computed[row] + step.lengths[row] - offsets[row, s])
            read = [(int(t) + 7) % SIZE if s == 2 else int(t) for t in best]
            after = np.array([world.value(s, row, end, t) for t in read])
            prefix = float(world.hidden(s)[j, 0])
            ending = np.isin(best.numpy(), [END, OWN] if j % 2 else [END])
            want += beta * value_offsets(after, prefix, ending, values.ends)
        assert found.added[j, : values.top_k].numpy() == pytest.approx(want, abs=1e-5)
        assert not found.added[j, values.top_k :].any()
    rows_run = {s: sum(n for stream, n in world.ran if stream == s) for s in (1, 2)}
    assert rows_run == {1: 5 + 3, 2: 3 + 1 + SIZE}
    assert max(n for _, n in world.ran) <= chunk


def test_padding_is_no_candidate() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.bfloat16)
    found = candidates_of(scores, torch.tensor([1]))
    assert found.topk(2).indices.tolist() == [[2, 0]]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additions_ride_on_their_rows_and_land_on_their_ids(dtype: torch.dtype) -> None:
    layout = Layout((4,), dtype, candidates=3)
    table = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    padded = torch.tensor([38, 39])

    def unembed(h: torch.Tensor) -> torch.Tensor:
        return h @ table.T

    readout = Readout(layout, [unembed], [Vocabulary()], padded)
    hidden = torch.randn(5, layout.width, generator=torch.Generator().manual_seed(3)).to(dtype)
    control = np.zeros((4, 1 + EXTRA), np.float32)
    control[:, 0] = 1
    hidden[:, sum(layout.sizes) :] = 0
    layout.write_control(hidden, torch.from_numpy(control))
    ids, added = torch.tensor([[7, 21], [0, 37]]), torch.tensor([[0.5, -1e-7], [2.0, -2.0]])
    layout.write_additions(hidden, torch.tensor([1, 3]), ids, added)
    found = readout(hidden, Classes.all(1))
    assert found is not None
    want: Any = unembed(hidden[:, :4]).float()
    for row, (i, a) in zip((1, 3), zip(ids, added, strict=True), strict=True):
        want[row, padded] = float("-inf")
        want[row, i] += a
    assert torch.equal(found.z[[1, 3]], want[[1, 3]])
    # The others have the base's bits: nothing is added, and nothing is banned.
    assert torch.equal(found.z[[0, 2]], found.base[[0, 2]].float())


def test_begun_blocks_are_copied_to_their_rows_and_nowhere_else() -> None:
    cache = torch.arange(12.0).view(6, 2)
    broadcast(cache, cache[3:], [(slice(0, 1), 2), (slice(1, 3), 0)])
    assert cache.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [0, 1], [0, 1]]
    other = torch.arange(12.0).view(6, 2)
    gather(other, other[3:], torch.tensor([2, 0]))
    assert other.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [0, 1], [10, 11]]
