"""Sizes of graphs, and what they read of each row."""

from __future__ import annotations

import numpy as np
import pytest

from steering.worker.plan.batches import Candidates, StreamBatch
from steering.worker.step.graph_inputs import LARGEST, Field, graph_sizes, host_inputs


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
    assert graph_sizes(asked, most) == want


def test_sizes_end_somewhere() -> None:
    sizes = graph_sizes(None, 4096)
    assert sizes[-1] == LARGEST
    assert list(sizes) == sorted(set(sizes))


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
    found = host_inputs({0: batch, 2: candidates}, 40, 3, 4)
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
