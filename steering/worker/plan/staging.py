"""Stream batches on the device: all arrays of a step go there in one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steering.worker.plan.batches import Candidates, StreamBatch

_ALIGN = 16
"""Bytes at whose multiples each array begins."""


def to_device(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Host arrays on the model's device, by one asynchronous copy.

    Args:
        arrays: of any shape and dtype; not changed afterwards.
        device: of the results.
    """
    if device.type == "cpu":
        return tuple(torch.from_numpy(a) for a in arrays)
    starts = np.cumsum([0, *(-(-a.nbytes // _ALIGN) * _ALIGN for a in arrays)]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return tuple(
        there[start : start + a.nbytes].view(torch.from_numpy(a[:0]).dtype).view(a.shape)
        for start, a in zip(starts, arrays, strict=False)
    )


class HostCopy:
    """A tensor on its way to the host, by an asynchronous copy.

    Args:
        tensor: not changed afterwards.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._done = tensor, None
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor = pinned.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._done is None or self._done.query()

    def read(self) -> torch.Tensor:
        """The tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor.cpu()


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A stream batch, and its arrays on the device. Letters and meanings as in `StreamBatch`.

    Args:
        host: the batch.
        rows: [n] int64.
        tokens: [T_i] int64.
        positions: [T_i] int64.
        token_rows: [T_i] int64.
        starts: [n + 1] int32.
        lengths: [n] int32.
        own_at: [k] int64.
        own_ids: [k] int64.
    """

    host: StreamBatch
    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    token_rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    own_at: torch.Tensor
    own_ids: torch.Tensor

    def at(self, positions: torch.Tensor, host: StreamBatch) -> StagedBatch:
        """The same one-token rows at positions that only the device knows; the host's are bounds.

        Args:
            positions: [n] int64, at most the host's.
            host: the rows with these bounds.
        """
        return replace(self, host=host, positions=positions, lengths=(positions + 1).int())

    def blocks(self, table: torch.Tensor, block_size: int, scratch: int) -> torch.Tensor:
        """[n, B] int32 the rows' block ids; of candidates, the last one of row i is scratch + i.

        Args:
            table: [Q, B] int32 block ids of the step's requests.
            block_size: tokens per block.
            scratch: the first scratch block.
        """
        blocks = table[self.rows]
        if isinstance(self.host, Candidates):
            last = self.positions // block_size
            blocks[self.token_rows, last] = (scratch + self.token_rows).to(blocks.dtype)
        return blocks

    def slots(self, blocks: torch.Tensor, block_size: int) -> torch.Tensor:
        """[T_i] int64 KV slots.

        Args:
            blocks: [n, B] int32 the rows' block ids.
            block_size: tokens per block.
        """
        own = blocks[self.token_rows, self.positions // block_size]
        return own.long() * block_size + self.positions % block_size


class Staging:
    """Host arrays of one step, which go to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self._parts: list[tuple[int, Callable[[Sequence[torch.Tensor]], None]]] = []

    def add(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        then: Callable[[Sequence[torch.Tensor]], None],
    ) -> None:
        """Takes arrays, not changed afterwards; `then` gets them on the device."""
        self._arrays.extend(arrays)
        self._parts.append((len(arrays), then))

    def send(self, device: torch.device) -> None:
        """Copies all of them to the device, asynchronously."""
        if not self._arrays:
            return
        there, start = to_device(self._arrays, device), 0
        for count, then in self._parts:
            then(there[start : start + count])
            start += count


def stage(batches: Sequence[StreamBatch], device: torch.device) -> list[StagedBatch]:
    """Brings stream batches to the device."""
    there = to_device([array for b in batches for array in arrays_of(b)], device)
    return [StagedBatch(b, *there[8 * i : 8 * i + 8]) for i, b in enumerate(batches)]


def arrays_of(b: StreamBatch) -> tuple[npt.NDArray[Any], ...]:
    """What a `StagedBatch` has on the device, in its order."""
    return b.rows, b.tokens, b.positions, b.token_rows, b.starts, b.lengths, b.own_at, b.own_ids
