"""The step's interface to vLLM's model runner; `v1.py` and `v2.py` implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from steering.worker.plan.batches import Int32, Int64, Schedule
from steering.worker.plan.phases import Replies
from steering.worker.readout.watch import Watch

Sampled = Callable[[torch.Tensor], None]
"""Called with [Q, K + 1] int64 what a step drew, on the device: −1 where it drew nothing."""


class RunnerView(ABC):
    """Reads one of vLLM's model runners.

    Args:
        runner: the worker's, after its KV cache was initialised.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.device: torch.device = runner.device

    @abstractmethod
    def schedule(self) -> Schedule | None:
        """What vLLM scheduled in this step; None in its dummy and profiling runs, which have no
        requests. The states of these requests are up to date.
        """

    @abstractmethod
    def block_table(self, kv_group: int) -> tuple[torch.Tensor, int]:
        """([Q, B] int32 block ids of the step's requests, on the device; tokens per block)."""

    @property
    def fixed_block_tables(self) -> Sequence[tuple[torch.Tensor, int]] | None:
        """Per KV cache group ([≥ Q, B] int32, tokens per block): in each step `block_table` is the
        first rows of it. None if captured graphs cannot count on that.
        """
        return None

    @property
    @abstractmethod
    def kernel_block_sizes(self) -> Sequence[int]:
        """Per KV cache group, tokens per block as kernels see them."""

    @abstractmethod
    def adapter_sets(self, requests: int) -> Int64:
        """[Q] ids of the requests' sets of adapters, 0 for none."""

    @abstractmethod
    def holds(self, request_id: str) -> bool:
        """Whether a request still runs, or waits for a step to go on where it was."""

    @abstractmethod
    def replies(self, rows: Int64, schedule: Schedule) -> Sequence[Int32] | Replies:
        """The tokens of some of the step's requests, prompts and this step's included.

        Args:
            rows: [m] of the step.
            schedule: of the step.
        """

    @abstractmethod
    def truncate(self, padded: torch.Tensor | None) -> None:
        """Makes the sampler know top-nσ.

        Args:
            padded: [P] int64 ids of the base's table that are no token, or None.
        """

    @abstractmethod
    def observe(self, watch: Watch, sampled: Sampled) -> None:
        """Sends the flags of each step's requests to the scheduler, beside the drawn tokens.

        Args:
            watch: has the flags.
            sampled: is called behind each step's sampler.
        """
