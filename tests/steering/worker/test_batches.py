"""Stream batches against a plain Python mirror: one token at a time, no arithmetic tricks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from steering.worker.plan.batches import Candidates, OwnPrompts, stream_batch
from steering.worker.plan.staging import stage, to_device
from tests.steering.worker.schedules import scheduled

BLOCK = 4


class Row:
    """One request's part in one step."""

    def __init__(self, rng: random.Random) -> None:
        self.uses = rng.random() < 0.7
        self.offset = rng.choice([0, 0, 1, 3, 9])
        self.computed = rng.choice([0, 1, 4, 7, 12])
        self.length = rng.choice([1, 1, 2, 5, 8])
        own = rng.random() < 0.5
        self.prompt = (
            np.array([1000 + i for i in range(rng.randint(1, 10))], np.int32) if own else None
        )


def mirror(rows: list[Row], token_ids: list[int], table: np.ndarray) -> list[tuple[int, ...]]:
    """(request, token's place, id read, position, slot) of every token that the stream runs."""
    run: list[tuple[int, ...]] = []
    place = 0
    for r, row in enumerate(rows):
        for t in range(row.computed, row.computed + row.length):
            position = t - row.offset
            if row.uses and position >= 0:
                read = token_ids[place]
                if row.prompt is not None and position < len(row.prompt):
                    read = int(row.prompt[position])
                slot = int(table[r, position // BLOCK]) * BLOCK + position % BLOCK
                run.append((r, place, read, position, slot))
            place += 1
    return run


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_the_mirror(seed: int) -> None:
    rng = random.Random(seed)
    rows = [Row(rng) for _ in range(rng.randint(1, 9))]
    starts = np.cumsum([0, *(row.length for row in rows)]).astype(np.int32)
    token_ids = [rng.randrange(1000) for _ in range(int(starts[-1]))]
    blocks = list(range(len(rows) * 8))
    rng.shuffle(blocks)
    table = np.array(blocks, np.int32).reshape(len(rows), 8)
    schedule = scheduled(starts.tolist(), [row.computed for row in rows])

    batch = stream_batch(
        schedule,
        np.array([row.uses for row in rows]),
        np.array([row.offset for row in rows], np.int32),
        OwnPrompts.of([row.prompt for row in rows]),
    )

    want = mirror(rows, token_ids, table)
    if batch is None:
        assert want == []
        return
    read = [token_ids[t] for t in batch.tokens]
    for at, own in zip(batch.own_at, batch.own_ids, strict=True):
        read[at] = int(own)
    requests = batch.rows[batch.token_rows]
    [staged] = stage([batch], torch.device("cpu"))
    slots = staged.slots(staged.blocks(torch.from_numpy(table), BLOCK, 0), BLOCK).tolist()
    assert [*zip(requests, batch.tokens, read, batch.positions, slots, strict=True)] == want
    for k, r in enumerate(batch.rows):
        assert batch.starts[k + 1] - batch.starts[k] == sum(w[0] == r for w in want)
        assert batch.lengths[k] == rows[r].computed + rows[r].length - rows[r].offset


def test_nothing_to_run_is_none() -> None:
    schedule = scheduled([0, 3], [2])
    offset = np.array([9], np.int32)
    assert stream_batch(schedule, np.array([False]), np.array([0], np.int32), None) is None
    assert stream_batch(schedule, np.array([True]), offset, None) is None


def test_candidates_read_the_prefix_and_write_to_scratch() -> None:
    table = np.array([[3, 4, 5], [7, 8, 9]], np.int32)
    prefixes = np.array([BLOCK - 1, BLOCK - 1, BLOCK], np.int32)
    batch = Candidates.of(np.array([0, 0, 1]), prefixes)
    assert batch.lengths.tolist() == [BLOCK, BLOCK, BLOCK + 1]
    [staged] = stage([batch], torch.device("cpu"))
    blocks = staged.blocks(torch.from_numpy(table), BLOCK, scratch=100)
    assert blocks.tolist() == [[100, 4, 5], [101, 4, 5], [7, 102, 9]]
    assert table.tolist() == [[3, 4, 5], [7, 8, 9]]
    slots = [100 * BLOCK + BLOCK - 1, 101 * BLOCK + BLOCK - 1, 102 * BLOCK]
    assert staged.slots(blocks, BLOCK).tolist() == slots
    # The third begins a block of its own: nothing to copy.
    assert batch.begun(BLOCK) == [(slice(0, 2), 0, 0)]
    apart = Candidates.of(np.array([1, 0, 1]), np.array([1, BLOCK + 1, 1], np.int32))
    assert apart.begun(BLOCK) == [(slice(0, 1), 1, 0), (slice(1, 2), 0, 1), (slice(2, 3), 1, 0)]


def test_arrays_go_to_a_device_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device, as far as a machine without one can tell: memory that is not the host's."""
    copies: list[torch.Tensor] = []

    def copied(self: torch.Tensor, device: object, *, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        copies.append(self.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "to", copied)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: empty(*size, **more))
    arrays = [np.arange(3), np.arange(5, dtype=np.int32), np.empty(0, np.int64),
              np.array([[1.5, 2.5]], np.float32)]  # fmt: skip
    there = to_device(arrays, torch.device("meta"))
    assert len(copies) == 1
    for array, tensor in zip(arrays, there, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array)) and tensor.shape == array.shape
        assert not tensor.numel() or tensor.data_ptr() % 16 == copies[0].data_ptr() % 16
