"""The adapter sum on NVIDIA GPUs: where the worker chooses Triton, and what it does instead of
making groups.

Checked through Triton's interpreter; has not been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.platforms import current_platform

from adapters.kernels.lines import Lines
from steering.adapters import MOST_WHERES
from steering.worker.adapting.groups import Adapted
from steering.worker.adapting.lines import Place, StreamLines, stream_lines
from steering.worker.plan.batches import Bool, Int32, Int64
from steering.worker.plan.staging import to_device

if TYPE_CHECKING:
    from adapters.kernels.triton_sum import AdapterTables

_LOG = logging.getLogger(__name__)


def triton_adding(runner: Any, streams: Sequence[str]) -> TritonAdding | None:
    """The Triton path, on platforms that have it; None where torch does the work.

    Args:
        runner: vLLM's model runner, with LoRA enabled.
        streams: that run, twins included.
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
        streams,
        runner.device,
        scheduler.max_num_batched_tokens,
        # A request has a line for each set of adapters that act together on some of its tokens.
        min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs << MOST_WHERES),
        lora.max_loras,
        lora.max_lora_rank,
    )


class Pass(NamedTuple):
    """One forward pass of a stream.

    Args:
        stream: that runs.
        owner: the stream whose layers it runs: itself, or the original of a twin.
        requests: [T] index of each token's request.
        total: tokens that the layers see, padding included, ≥ T.
        active: [T, W] whether each of `Adapted.wheres` holds for a token; None: all do.
        ahead: [T] position − L where a prompt is read, 0 behind it; None: no adapter has a
            condition.
        lengths: [Q] L, of each request's prompt in this stream; likewise.
    """

    stream: str
    owner: str
    requests: Int64
    total: int
    active: Bool | None = None
    ahead: Int64 | None = None
    lengths: Int64 | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Passes of one stream with the same key have the same tables."""
        active = None if self.active is None else self.active.tobytes()
        ahead = None if self.ahead is None else self.ahead.tobytes()
        return self.owner, self.requests.tobytes(), self.total, active, ahead


@dataclass(frozen=True)
class Write:
    """Tables of one pass, to be brought to the device and put in their place.

    Args:
        stream: whose.
        arrays: the tables, and where in the counts each pack's routes will lie.
        total: as in `Pass`.
        counting: whether routes are counted.
        held: what the stream's tables hold then.
    """

    stream: str
    arrays: tuple[Int32 | Int64, ...]
    total: int
    counting: bool
    held: _Held

    @property
    def lines(self) -> StreamLines | None:
        """The lines of the pass; None if nothing is added."""
        return self.held.lines


class _Held(NamedTuple):
    """What a stream's tables hold: for whose uses, by which key, which lines."""

    uses: Any = None
    key: Any = None
    lines: StreamLines | None = None


class TritonAdding:
    """Writes the tables of the kernels before each stream's forward pass.

    Belongs to one worker process. Each stream has tables of its own, a twin too; they stay where
    they are, as large as any step can need, so recorded graphs may read them.

    Args:
        streams: their names.
        device: that they run on.
        tokens: the most tokens of a pass, padding included.
        lines: the most lines of a step.
        slots: of the engine.
        ranks: rank indices of a slot.
    """

    def __init__(
        self,
        streams: Sequence[str],
        device: torch.device,
        tokens: int,
        lines: int,
        slots: int,
        ranks: int,
    ) -> None:
        from adapters.kernels.triton_sum import AdapterTables

        self._tables: dict[str, AdapterTables] = {
            name: AdapterTables(device, tokens, lines, slots, ranks) for name in streams
        }
        self._device = device
        self._held = dict.fromkeys(streams, _Held())
        self._places: dict[str, list[tuple[Place, torch.Tensor, torch.Tensor]]] = {}

    def writes(self, adapted: Adapted | None, passes: Sequence[Pass]) -> list[tuple[int, Write]]:
        """What has to be written before some passes run; nothing where it is there already.

        While the same requests decode nothing of it changes; but counts of routes are a step's own.

        Args:
            adapted: the adapters of this step's requests; None if there are none.
            passes: in the order in which they run; of one stream there may be several.

        Returns:
            (index of a pass, what is to be `put` before it).
        """
        found, held = [], {one.stream: self._held[one.stream] for one in passes}
        for number, one in enumerate(passes):
            before, after = held[one.stream], self._wanted(adapted, one, held[one.stream])
            if after is before:
                continue
            held[one.stream] = after
            if after.lines is not None or before.lines is not None:
                counting = adapted is not None and adapted.counting
                found.append((number, self._write(one, after, counting)))
            elif before is self._held[one.stream]:  # empty as it is, which need not be found again
                self._held[one.stream] = after
        return found

    @staticmethod
    def _wanted(adapted: Adapted | None, one: Pass, held: _Held) -> _Held:
        """What the tables must hold for a pass; `held` itself if that is there."""
        if adapted is None:
            return held if held.lines is None else _Held()
        key = tuple(adapted.slots.items()), one.key
        if not adapted.counting and held.uses is adapted.uses and held.key == key:
            return held
        lines = stream_lines(adapted, one.stream, one.owner, one.requests, one.active)
        return _Held(None if adapted.counting else adapted.uses, key, lines)

    def _write(self, one: Pass, held: _Held, counting: bool) -> Write:
        lines = held.lines
        packed = self._tables[one.stream].packed(_table(lines), one.total, counting)
        places = lines.places() if lines is not None and counting else []
        arrays: list[Int32 | Int64] = [packed]
        for place in places:
            arrays += [place.requests, place.numbers]
        return Write(one.stream, tuple(arrays), one.total, counting, held)

    def put(self, write: Write, there: Sequence[torch.Tensor]) -> None:
        """Puts tables in their place.

        Args:
            write: from `writes`.
            there: its arrays, on the device.
        """
        table, *rest = there
        tables = self._tables[write.stream]
        tables.put(table, _table(write.lines), write.total, write.counting)
        places = write.lines.places() if write.lines is not None and write.counting else []
        own = zip(places, rest[::2], rest[1::2], strict=True)
        self._places[write.stream] = list(own)
        self._held[write.stream] = write.held

    def routed(self, adapted: Adapted, stream: str) -> None:
        """Notes where the tokens of a stream's pass were routed, once it ran."""
        if adapted.counting:
            tables, requests = self._tables[stream], len(adapted.uses)
            for place, own, numbers in self._places.pop(stream, ()):
                adapted.routed.append(place.routed(stream, requests, tables.counts, own, numbers))

    @contextmanager
    def launching(self, stream: str) -> Iterator[None]:
        """Makes layers that run inside launch the kernels, whatever the stream's tables hold."""
        from adapters.kernels import triton_operation

        with triton_operation.adding(self._tables[stream]):
            yield

    @contextmanager
    def adapting(self, adapted: Adapted, one: Pass, *, written: bool = False) -> Iterator[None]:
        """As `LoraSeam.adapting`; what is not written yet goes by a copy of its own."""
        for _, write in () if written else self.writes(adapted, [one]):
            self.put(write, to_device(write.arrays, self._device))
        if self._held[one.stream].lines is None:
            yield
            return
        with self.launching(one.stream):
            yield
        self.routed(adapted, one.stream)

    def warm_up(self, layers: Sequence[Any]) -> int:
        """Compiles every kernel that a step can need; how many launches that took.

        Kernels differ by a layer's sizes and by `triton_sum.CLASSES` of tokens. Nothing is added:
        the tables are empty.

        Args:
            layers: vLLM's wrappers of linear layers.
        """
        from adapters.kernels import operation
        from adapters.kernels.triton_sum import CLASSES, add_adapters

        tables = next(iter(self._tables.values()))
        kinds = {}
        for layer in layers:
            a, b = layer.lora_a_stacked, layer.lora_b_stacked
            if isinstance(a, tuple) and hasattr(layer, "output_slices"):
                split = getattr(layer.punica_wrapper, "split", False)
                kinds[_signature((*a, *b)), tuple(layer.output_slices), split] = layer
        launches = 0
        for (*_, split), layer in kinds.items():
            over_ranks = operation.sum_over_ranks if split else None
            a, b, sizes = layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices
            for total in CLASSES:
                if total <= tables.most_tokens:
                    x = a[0].new_zeros(total, a[0].shape[-1])
                    add_adapters(x.new_zeros(total, sum(sizes)), x, a, b, sizes, tables, over_ranks)
                    launches += 1
        return launches


def _table(lines: StreamLines | None) -> Lines:
    return Lines.none() if lines is None else lines.lines


def _signature(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple((t.dtype, tuple(t.shape), t.stride()) for t in tensors)
