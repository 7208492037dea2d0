"""Section F: a toy decoder of two streams, launched piece by piece and as a graph per stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from adapters.kernels.triton_sum import AdapterTables, add_adapters
from load_tests.gpu_check.place import DEVICE, GPU, graphs
from load_tests.gpu_check.sections import Clock, Finding
from steering.kernels.triton_mix import read_out
from tests.adapters.mixed import Layer
from tests.adapters.steps import SETS, step

ROWS, HIDDEN, LAYERS, PAST, SIZE = (16, 1024, 24, 256, 32_000) if GPU else (2, 32, 1, 4, 100)
HEADS = HIDDEN // 32
STEPS = 30 if GPU else 1
ALLOWED = 1e-2 if GPU else 0.0
"""Allowed error over the largest score: a graph may cut products of matrices otherwise."""


class Stream:
    """Attention over a fixed past and an MLP per layer, every product with its adapter sum.

    Attributes:
        x: [R, H] what it reads.
        logits: [R, V] where its scores go.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape).mul_(HIDDEN**-0.5).to(DEVICE, dtype)

        sizes = (HIDDEN, HIDDEN, HIDDEN)
        self._adapted = Layer(HIDDEN, sizes, SETS, dtype, seed=seed)
        self._a = [part.to(DEVICE) for part in self._adapted.a]
        self._b = [part.to(DEVICE) for part in self._adapted.b]
        self.tables = AdapterTables(DEVICE, ROWS, 20, self._adapted.slots, self._adapted.room)
        self._qkv = [normal(3 * HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self._up = [normal(2 * HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self._down = [normal(HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self._past = [normal(2, ROWS, HEADS, PAST, 32) for _ in range(LAYERS)]
        self._table = normal(SIZE, HIDDEN)
        self.x = normal(ROWS, HIDDEN)
        self.logits = torch.zeros(ROWS, SIZE, dtype=dtype, device=DEVICE)

    def other_adapters(self) -> None:
        """Writes the tables of other requests."""
        self.tables.write(step(self._adapted, ROWS, 5)[0], ROWS)

    def forward(self) -> None:
        """One step."""
        h = self.x
        for qkv, up, down, past in zip(self._qkv, self._up, self._down, self._past, strict=True):
            x = rms_norm(h, (HIDDEN,))
            y = x @ qkv.T
            add_adapters(y, x, self._a, self._b, self._adapted.sizes, self.tables)
            q, k, v = (part.view(ROWS, HEADS, 1, 32) for part in y.chunk(3, 1))
            keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            h = h + scaled_dot_product_attention(q, keys, values).reshape(ROWS, HIDDEN)
            gate, value = (rms_norm(h, (HIDDEN,)) @ up.T).chunk(2, 1)
            h = h + (silu(gate) * value) @ down.T
        self.logits.copy_(h @ self._table.T)


def launches(clock: Clock) -> Finding:
    """Both ways give the same scores, whatever the tables say."""
    with graphs(), torch.inference_mode():
        streams = [Stream(seed, torch.bfloat16 if GPU else torch.float32) for seed in (1, 2)]
        coef = torch.tensor([[1.0, 0.7]], device=DEVICE).repeat(ROWS, 1)

        def score() -> torch.Tensor:
            z, _ = read_out([stream.logits for stream in streams], coef, None, lacking=False)
            return z

        def eager() -> torch.Tensor:
            for stream in streams:
                stream.forward()
            return score()

        eager()  # compiles
        recorded = [_record(stream.forward) for stream in streams]
        place = score()
        recorded.append(_record(lambda: place.copy_(score())))

        def replay() -> torch.Tensor:
            for graph in recorded:
                graph.replay()
            return place

        bits, done, worst = 0, 0, 0.0
        for _ in clock.cases(range(8 if GPU else 2)):
            for stream in streams:
                stream.other_adapters()
            want = eager().clone()
            for stream in streams:
                stream.logits.zero_()
            error = float((replay() - want).abs().max() / want.abs().max())
            bits, done = bits + (error != 0), done + 1
            worst = error if not error <= worst else worst
        data: dict[str, Any] = {"steps": done, "differ": bits, "worst": worst}
        said = f"{done} steps, {bits} differ from launches one by one (worst {worst:.0e})"
        if GPU:
            for name, work in (("eager", eager), ("graphs", replay)):
                data[name] = _times(work)
                said += f"; {name} {data[name]['launch_ms']:.2f} ms to launch"
                said += f", {data[name]['step_ms']:.2f} ms in all"
    return Finding(worst <= ALLOWED, said, data)


def _record(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _times(work: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds until all is launched, and until all is done."""
    launched, done = [], []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        launched.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - begin)
    return {
        "launch_ms": 1e3 * statistics.median(launched),
        "step_ms": 1e3 * statistics.median(done),
    }
