"""Slots are cleared as far as they were filled, and sets are read in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steering.worker.adapting.sets import _Reading, arrange


class Layer:
    """A vLLM layer that packs two: what `arrange` needs of it."""

    base_layer = None

    def __init__(self) -> None:
        self.lora_a_stacked = tuple(torch.zeros(2, 1, 8, 5) for _ in range(2))
        self.lora_b_stacked = tuple(torch.zeros(2, 1, 7, 8) for _ in range(2))

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """As in vLLM: clears the slot, then copies what there is."""
        self.reset_lora(index)
        for into, part in zip(self.lora_a_stacked, lora_a, strict=True):
            if part is not None:
                into[index, 0, : part.shape[0]] = part
        for into, part in zip(self.lora_b_stacked, lora_b, strict=True):
            if part is not None:
                into[index, 0, :, : part.shape[1]] = part

    def reset_lora(self, index: int) -> None:
        """Replaced by what is tested."""
        raise AssertionError


def drawn(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, 5), torch.randn(7, rank)


def test_a_slot_holds_nothing_of_its_last_set() -> None:
    layer = Layer()
    arrange(SimpleNamespace(modules={"layer": layer, "other": object()}))
    first, second = drawn(6), drawn(3)
    layer.set_lora(0, [first[0], second[0]], [first[1], second[1]])
    layer.set_lora(1, [first[0], None], [first[1], None])
    layer.set_lora(0, [None, second[0]], [None, second[1]])
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    assert a[0][0].count_nonzero() == b[0][0].count_nonzero() == 0
    assert torch.equal(a[1][0, 0, :3], second[0]) and torch.equal(b[1][0, 0, :, :3], second[1])
    assert a[1][0, 0, 3:].count_nonzero() == b[1][0, 0, :, 3:].count_nonzero() == 0
    assert torch.equal(a[0][1, 0, :6], first[0])  # the other slot is left alone
    layer.reset_lora(1)
    assert a[0][1].count_nonzero() == b[0][1].count_nonzero() == 0


def test_reading_goes_on_where_it_stopped() -> None:
    taken = []

    def parts() -> Iterator[tuple[str, Any]]:
        for i in range(5):
            taken.append(i)
            yield str(i), None

    reading = _Reading(parts())
    assert not reading.read(0.0) and not reading.read(0.0)
    assert taken == [0, 1]
    assert [name for name, _ in reading] == list("01234")
    whole = _Reading(parts())
    assert whole.read(60.0)
    assert [name for name, _ in whole] == list("01234")
    assert taken == 2 * [0, 1, 2, 3, 4]


def test_a_reading_that_fails_says_so() -> None:
    def parts() -> Iterator[tuple[str, Any]]:
        yield "0", None
        raise OSError("gone")

    reading = _Reading(parts())
    assert not reading.read(0.0)
    with pytest.raises(OSError, match="gone"):
        reading.read(0.0)
