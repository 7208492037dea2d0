"""The tokens of a step, sorted by slot and cut into tiles."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.kernels.lines import Lines, Tiles, most_tiles
from tests.adapters.mixed import Ask, Part, line

LINE = line((Part((2,)),), [Ask(1.0)])


def lines(slots: list[int], tokens: list[int]) -> Lines:
    made = tuple(LINE for _ in slots)
    return Lines(made, np.array(slots, np.int32), np.array(tokens, np.int32))


def test_tokens_of_a_slot_lie_side_by_side() -> None:
    # Requests 0 and 2 share slot 5; token 3 has no adapter.
    tiles = Tiles.of(lines([5, 1, 5], [0, 1, 2, -1, 0, 1, 2]), 2)
    assert tiles.tokens.tolist() == [1, 5, 0, 2, 4, 6]
    assert tiles.lines.tolist() == [1, 1, 0, 2, 0, 2]
    assert tiles.slots.tolist() == [1, 5, 5]
    assert tiles.starts.tolist() == [0, 2, 4]
    assert tiles.ends.tolist() == [2, 4, 6]
    assert tiles.first_lines.tolist() == [1, 0, 0]


def test_no_token_with_an_adapter() -> None:
    for tiles in (Tiles.of(lines([3], [-1, -1]), 16), Tiles.of(lines([], []), 16)):
        assert all(part.size == 0 for part in tiles)


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("tokens", [1, 2, 63, 300])
def test_every_token_is_in_one_tile_of_its_slot(tokens: int, size: int) -> None:
    random = np.random.default_rng(tokens)
    for requests in (1, 7, 90):
        slots = random.integers(0, 12, requests)
        own = random.integers(-1, requests, tokens)
        tiles = Tiles.of(lines(slots.tolist(), own.tolist()), size)
        assert tiles.slots.size <= most_tiles(tokens, 12, size)
        covered = np.zeros(tiles.tokens.size, int)
        for slot, start, end in zip(tiles.slots, tiles.starts, tiles.ends, strict=True):
            assert 0 < end - start <= size
            covered[start:end] += 1
            assert (slots[own[tiles.tokens[start:end]]] == slot).all()
        assert (covered == 1).all()
        assert sorted(tiles.tokens) == np.flatnonzero(own >= 0).tolist()
        assert np.array_equal(tiles.lines, own[tiles.tokens])


@pytest.mark.parametrize("size", [2, 16])
def test_the_bound_on_tiles_is_reached(size: int) -> None:
    """Five slots with a full tile and one token more each."""
    own = [slot for slot in range(5) for _ in range(size + 1)]
    tiles = Tiles.of(lines(list(range(5)), own), size)
    assert tiles.slots.size == 10 == most_tiles(5 * size, 5, size)
