"""Sizes of graphs, and what they read of each row."""

from __future__ import annotations

import numpy as np
import pytest

from steering.worker.plan.batches import Candidates, OwnPrompts, StreamBatch, stream_batch
from steering.worker.step.graph_inputs import (
    LARGEST,
    PIECES,
    Field,
    Shape,
    graph_shapes,
    host_inputs,
    piece_shapes,
)
from tests.steering.worker.schedules import scheduled


@pytest.mark.parametrize(
    ("asked", "most", "want"),
    [
        (None, 24, (1, 2, 4, 8, 16, 24)),
        ([], 3, (1, 2, 3)),
        ([1, 2, 4], 3, (1, 2, 3)),
        ([8], 4, (4,)),
        ([2], 8, (2,)),
        ([4, 1, 4], 4, (1, 4)),
    ],
)
def test_sizes_are_those_asked_for_up_to_the_most_requests(
    asked: list[int] | None, most: int, want: tuple[int, ...]
) -> None:
    assert graph_shapes(asked, most, 96, 0) == tuple(Shape(rows, 1) for rows in want)


def test_sizes_end_somewhere() -> None:
    shapes = graph_shapes(None, 4096, 8192, 0)
    assert shapes[-1] == (LARGEST, 1)
    assert list(shapes) == sorted(set(shapes))


def test_where_drafts_are_verified_sizes_are_of_tokens() -> None:
    """As vLLM has them: the numbers of rows are those that this many tokens fill."""
    assert graph_shapes([2, 4, 9, 12], 4, 96, 2) == (
        (2, 1), (1, 3), (4, 1), (2, 3), (3, 3), (4, 3)
    )  # fmt: skip
    assert graph_shapes([2, 8], 4, 96, 2) == ((2, 1), (1, 3), (4, 1), (3, 3))
    assert graph_shapes([24], 8, 20, 2) == ((8, 1),)
    assert all(shape.tokens <= LARGEST + 3 for shape in graph_shapes(None, 4096, 8192, 3))


def test_sizes_of_graphs_in_pieces_are_apart() -> None:
    assert piece_shapes([1, 2, 4, 8, 32], 16) == ((1, 0), (2, 0), (4, 0), (8, 0))
    assert piece_shapes([56, 60, 64], 64) == ((56, PIECES), (64, PIECES))
    assert piece_shapes([600], 512) == ()
    sizes = [shape.tokens for shape in piece_shapes(None, 8192)]
    assert sizes[-1] == LARGEST and sizes[0] == 1 and len(sizes) == 24


def test_each_row_has_its_inputs_and_padding_has_none() -> None:
    batch = StreamBatch(
        rows=np.array([0, 3]),
        tokens=np.array([1, 6]),
        positions=np.array([9, 4]),
        token_rows=np.array([0, 1]),
        starts=np.array([0, 1, 2], np.int32),
        lengths=np.array([10, 5], np.int32),
        own_at=np.array([1]),
        own_ids=np.array([77]),
    )
    candidates = Candidates.of(np.array([2, 2, 5]), np.array([6, 6, 1], np.int32))
    found = host_inputs({0: (batch, Shape(4, 1)), 2: (candidates, Shape(4, 1))}, 40, 3, 4)
    assert found.shape == (3, len(Field), 4)
    assert found[0, Field.REQUEST].tolist() == [0, 3, -1, -1]
    assert found[0, Field.TOKEN].tolist() == [1, 6, -1, -1]
    assert found[0, Field.OWN_ID].tolist() == [-1, 77, -1, -1]
    assert found[0, Field.POSITION].tolist() == [9, 4, -1, -1]
    assert found[0, Field.LENGTH].tolist() == [10, 5, 0, 0]
    assert (found[0, Field.BLOCK] == -1).all()
    assert found[2, Field.BLOCK].tolist() == [40, 41, 42, -1]
    assert found[2, Field.REQUEST].tolist() == [2, 2, 5, -1]
    assert (found[1, Field.POSITION] == -1).all()
    assert not found[1, Field.LENGTH].any()


def test_rows_of_several_tokens() -> None:
    schedule = scheduled([0, 3, 6], [7, 20])
    uses, offsets = np.array([True, True]), np.array([2, 0], np.int32)
    batch = stream_batch(schedule, uses, offsets, None)
    assert batch is not None and batch.width == 3
    found = host_inputs({0: (batch, Shape(3, 3))}, 40, 1, 9)[0]
    assert found[Field.REQUEST].tolist() == [0, 1, *[-1] * 7]
    assert found[Field.TOKEN].tolist() == [*range(6), *[-1] * 3]
    assert found[Field.PLACE].tolist() == [*range(6), *[-1] * 3]
    assert found[Field.POSITION].tolist() == [5, 6, 7, 20, 21, 22, *[-1] * 3]
    assert found[Field.LENGTH].tolist() == [8, 23, *[0] * 7]


def test_shorter_rows_begin_with_padding() -> None:
    schedule = scheduled([0, 3, 4], [7, 20])
    prompts = OwnPrompts.of([None, np.arange(50, 71, dtype=np.int32)])
    batch = stream_batch(schedule, np.array([True, True]), np.zeros(2, np.int32), prompts)
    assert batch is not None and batch.width == 3
    found = host_inputs({0: (batch, Shape(3, 3))}, 40, 1, 9)[0]
    assert found[Field.TOKEN].tolist() == [0, 1, 2, -1, -1, 3, *[-1] * 3]
    assert found[Field.POSITION].tolist() == [7, 8, 9, -1, -1, 20, *[-1] * 3]
    assert found[Field.OWN_ID].tolist() == [-1, -1, -1, -1, -1, 70, *[-1] * 3]
    assert found[Field.PLACE].tolist() == [0, 1, 2, 5, *[-1] * 5]
    assert found[Field.LENGTH].tolist() == [10, 21, *[0] * 7]


def test_rows_of_any_lengths_in_pieces() -> None:
    schedule = scheduled([0, 4, 5], [7, 20])
    prompts = OwnPrompts.of([np.arange(50, 59, dtype=np.int32), None])
    batch = stream_batch(schedule, np.array([True, True]), np.array([1, 0], np.int32), prompts)
    assert batch is not None
    found = host_inputs({0: (batch, Shape(8, PIECES))}, 40, 1, 8)[0]
    assert found[Field.REQUEST].tolist() == [0, 1, *[-1] * 6]
    assert found[Field.TOKEN].tolist() == [*range(5), *[-1] * 3]
    assert found[Field.ROW].tolist() == [0, 0, 0, 0, 1, *[-1] * 3]
    assert found[Field.END].tolist() == [4, 5, *[-1] * 6]
    assert found[Field.POSITION].tolist() == [6, 7, 8, 9, 20, *[-1] * 3]
    assert found[Field.OWN_ID].tolist() == [56, 57, 58, *[-1] * 5]
    assert found[Field.LENGTH].tolist() == [10, 21, *[0] * 6]
