"""The adapter sum on NVIDIA GPUs: where the worker chooses Triton, and what it does instead of
making groups.

Checked through Triton's interpreter; has not been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

from steering.worker.adapter_lines import StreamLines, stream_lines
from steering.worker.adapting import Adapted
from steering.worker.batches import Int64

if TYPE_CHECKING:
    from adapters.kernels.triton_sum import AdapterTables

_LOG = logging.getLogger(__name__)


def triton_adding(runner: Any) -> TritonAdding | None:
    """The Triton path, on platforms that have it; None where torch does the work.

    Args:
        runner: vLLM's model runner, with LoRA enabled.
    """
    if not current_platform.is_cuda():
        return None
    if importlib.util.find_spec("triton") is None:
        _LOG.warning("Triton is not installed: adapters run group by group in torch")
        return None
    from adapters.kernels import triton_operation

    triton_operation.register()
    scheduler, lora = runner.scheduler_config, runner.lora_config
    return TritonAdding(
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
        lora.max_loras,
        lora.max_lora_rank,
    )


class TritonAdding:
    """Writes the tables of the kernels around each stream's forward pass.

    Belongs to one worker process. Each stream has tables of its own, which stay where they are.

    Args:
        tokens: the most tokens of a step.
        lines: the most requests of a step.
        slots: of the engine.
        ranks: rank indices of a slot.
    """

    def __init__(self, tokens: int, lines: int, slots: int, ranks: int) -> None:
        self._room = tokens, lines, slots, ranks
        self._tables: dict[str, AdapterTables] = {}
        self._last: dict[str, tuple[Sequence[Any], Any, StreamLines | None]] = {}

    @contextmanager
    def adapting(
        self,
        adapted: Adapted,
        stream: tuple[str, str],
        requests: Int64,
        total: int,
        device: torch.device,
    ) -> Iterator[None]:
        """As `LoraSeam.adapting`."""
        from adapters.kernels import triton_operation

        tables = self._tables_of(stream[0], total, device)
        key = (stream[1], tuple(adapted.slots.items()), requests.tobytes(), total)
        # While the same requests decode nothing of it changes; counts of routes are the step's own.
        uses, last_key, lines = self._last.pop(stream[0], (None, None, None))
        if adapted.counting or uses is not adapted.uses or last_key != key:
            lines = stream_lines(adapted, *stream, requests)
            if lines is not None:
                tables.write(lines.lines, total, adapted.counting)
        if not adapted.counting:
            self._last[stream[0]] = adapted.uses, key, lines
        if lines is None:
            yield
            return
        with triton_operation.adding(tables):
            yield
        if adapted.counting:
            adapted.routed.extend(lines.routed(stream[0], len(adapted.uses), tables.counts))

    def _tables_of(self, stream: str, total: int, device: torch.device) -> AdapterTables:
        from adapters.kernels.triton_sum import AdapterTables

        tables = self._tables.get(stream)
        if tables is None or tables.most_tokens < total:
            tokens, *room = self._room
            tables = self._tables[stream] = AdapterTables(device, max(tokens, total), *room)
            self._last.pop(stream, None)
        return tables
