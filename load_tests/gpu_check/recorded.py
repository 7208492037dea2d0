"""Sections C and D: graphs of both sums are replayed over new data, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from adapters.kernels.lines import Lines
from adapters.kernels.triton_sum import AdapterTables, add_adapters
from load_tests.gpu_check.place import DEVICE, GPU, graphs, no_waits
from load_tests.gpu_check.sections import Clock, Finding
from steering.kernels.mix import Ends, Measures, Rules
from steering.kernels.triton_mix import read_out
from tests.adapters.mixed import KINDS, Layer
from tests.adapters.steps import SETS, step
from tests.steering.kernels.rows import Batch

BOTH = {0: SETS[1], 1: SETS[3], 2: KINDS[2], 3: KINDS[3]}
"""Every kind of set: a graph does not know which a step will have."""

Made = TypeVar("Made")

REPLAYS = 200 if GPU else 3
ROWS, STREAMS, SIZE = (10, 3, 8200) if GPU else (5, 2, 300)
INTO = 64 if GPU else 40
SIZES: tuple[int, ...] = (64, 32, 32) if GPU else (24, 9)
TOKENS = 8 if GPU else 4


@dataclass
class Sum:
    """A layer over T rows at a fixed place, with its tables."""

    layer: Layer
    rows: int

    def __post_init__(self) -> None:
        layer = self.layer
        self.a = [part.to(DEVICE) for part in layer.a]
        self.b = [part.to(DEVICE) for part in layer.b]
        self.tables = AdapterTables(DEVICE, self.rows, 20, layer.slots, layer.room)
        self.x = torch.zeros(self.rows, layer.into, dtype=layer.dtype, device=DEVICE)
        self.y = torch.zeros(self.rows, sum(layer.sizes), dtype=layer.dtype, device=DEVICE)

    def launch(self) -> None:
        """Adds to `y` what the tables say."""
        add_adapters(self.y, self.x, self.a, self.b, self.layer.sizes, self.tables)


class Scores:
    """A read-out with every rule and report, over tensors at fixed places."""

    def __init__(self, batch: Batch, dtype: torch.dtype) -> None:
        self.logits = [_wide(own) for own in batch.logits(dtype)]
        self.control = torch.zeros_like(batch.table(), device=DEVICE)
        found = batch.ending()
        assert found is not None
        self.ends = Ends(found.table.to(DEVICE), found.which.to(DEVICE))
        self.reported = torch.ones(len(batch.coef), device=DEVICE)
        self.put(batch, dtype)

    def put(self, batch: Batch, dtype: torch.dtype) -> None:
        """Writes other rows into the same places."""
        for place, own in zip(self.logits, batch.logits(dtype), strict=True):
            place.copy_(own)
        self.control.copy_(batch.table())

    def launch(self) -> tuple[torch.Tensor, Measures]:
        """The scores and their reports."""
        streams = len(self.logits)
        rules = Rules.of(self.control[:, streams:])._replace(ends=self.ends)
        coef = self.control[:, :streams]
        z, measures = read_out(self.logits, coef, rules, reported=self.reported)
        assert measures is not None
        return z, measures


def _wide(own: torch.Tensor) -> torch.Tensor:
    """The same shape on the device, its rows as far apart as in the original."""
    table = torch.zeros(own.shape[0], own.stride(0), dtype=own.dtype, device=DEVICE)
    return table[:, : own.shape[1]]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that are equal only if all bits are."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(whole[tensor.itemsize])


def _batch(seed: int) -> Batch:
    return Batch.draw(np.random.default_rng(seed), ROWS, STREAMS, SIZE, torch.bfloat16)


def _recorded(launch: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what is launched, and where its results lie."""
    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = launch()
    return graph, found


def replays(clock: Clock) -> Finding:
    """Both sums, recorded once: every replay against fresh launches, bit for bit."""
    differ, done = {"adapter sum": 0, "read-out": 0}, 0
    with graphs():
        layer = Layer(INTO, SIZES, BOTH, torch.bfloat16, seed=1)
        summed, scored = Sum(layer, TOKENS), Scores(_batch(0), torch.bfloat16)
        fresh_sum, fresh_scores = Sum(layer, TOKENS), Scores(_batch(0), torch.bfloat16)
        sum_graph, _ = _recorded(summed.launch)
        scores_graph, places = _recorded(scored.launch)
        for seed in clock.cases(range(REPLAYS)):
            done += 1
            # Every fifth step has no adapter.
            lines = step(layer, TOKENS, 1 + seed % 6)[0] if seed % 5 < 4 else Lines.none()
            x = layer.draw(TOKENS, layer.into)
            for own in (summed, fresh_sum):
                own.tables.write(lines, TOKENS)
                own.x.copy_(torch.from_numpy(x))
                own.y.copy_(layer.base(x))
            sum_graph.replay()
            fresh_sum.launch()
            differ["adapter sum"] += not torch.equal(_bits(summed.y), _bits(fresh_sum.y))
            batch = _batch(seed)
            for scores in (scored, fresh_scores):
                scores.put(batch, torch.bfloat16)
            scores_graph.replay()
            z, measures = fresh_scores.launch()
            pairs = zip((places[0], *places[1]), (z, *measures), strict=True)
            differ["read-out"] += any(not torch.equal(_bits(p), _bits(q)) for p, q in pairs)
    said = f"{done} replays of each sum, {sum(differ.values())} differ from fresh launches"
    return Finding(not any(differ.values()), said, {"replays": done, "differ": differ})


def waits(clock: Clock) -> Finding:
    """Tables, both sums with every rule and report, and replays, where a wait is an error."""
    with graphs():
        if not _notices():
            return Finding(False, "a wait that was made on purpose went unnoticed")
        layer = Layer(INTO, SIZES, BOTH, torch.bfloat16, seed=2)
        summed, scored = Sum(layer, TOKENS), Scores(_batch(0), torch.bfloat16)
        steps = [step(layer, TOKENS, 5)[0] for _ in range(10 if GPU else 1)]
        summed.launch()  # compiles
        scored.launch()
        graph, _ = _recorded(summed.launch)
        done = 0
        for lines in clock.cases(steps):
            if not GPU:  # a capture sees the host's tables as memory that is not pinned
                summed.tables.write(lines, TOKENS)
            with no_waits():
                if GPU:
                    summed.tables.write(lines, TOKENS)
                    graph.replay()
                summed.launch()
                scored.launch()
            done += 1
    how = "PyTorch raises at a wait" if GPU else "a capture raises at a host read"
    return Finding(True, f"{done} steps, 0 waits ({how})", {"steps": done})


def _notices() -> bool:
    """Whether a wait would be noticed."""
    number = torch.ones(1, device=DEVICE)
    try:
        with no_waits():
            number.item()
    except RuntimeError:
        return True
    return False
