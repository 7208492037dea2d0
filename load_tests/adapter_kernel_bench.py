"""What the Triton kernels of the adapter sum cost on an NVIDIA GPU, at real shapes.

    python -m load_tests.adapter_kernel_bench --out results      # results.json and results.md

One row is one transformer layer: its seven adapted modules as vLLM packs them (qkv, o, gate and up,
down), with constant gates over 1 to 128 adapters or with a routed pack of 28. Weights are random;
each result is checked against the torch path before it is timed. Before every timed run the GPU's
second-level cache is overwritten, as other weights do between two visits to the same adapter.

Times are medians: of the launches in a CUDA graph, of the same launches from Python, and of the
torch path from Python. The share of the bandwidth is that of the first, against a copy in the same
run; the bytes are those that must move in any case (A and B of the sets used, x, y twice).

Without an NVIDIA GPU nothing is measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapters.kernels import gated
from adapters.kernels.lines import CONSTANT, Line, Lines

if TYPE_CHECKING:
    from adapters.kernels.triton_sum import AdapterTables

MEMBERS, TOP_K = 28, 2
"""Members and top k of the pack that MeteoRA's authors released; its rank is 8."""
RUNS, WARM_UPS = 30, 5


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        hidden, kv, inner: widths of the model, of its keys (and values), of its MLP.
        rank: of each adapter, or of each member of the pack.
        tokens: T, dealt to the adapters in turn.
        adapters: sets in use; 1 for a pack.
        pack: whether the set is a routed pack of 28.
    """

    hidden: int
    kv: int
    inner: int
    rank: int
    tokens: int
    adapters: int
    pack: bool = False

    @property
    def layers(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(in, packed sizes) of qkv, o, gate and up, down."""
        return (
            (self.hidden, (self.hidden, self.kv, self.kv)),
            (self.hidden, (self.hidden,)),
            (self.hidden, (self.inner, self.inner)),
            (self.inner, (self.hidden,)),
        )

    @property
    def columns(self) -> int:
        """R of a set."""
        return self.rank * (MEMBERS if self.pack else 1)

    @property
    def gates(self) -> int:
        """G of a set."""
        return MEMBERS if self.pack else 0

    def least_bytes(self, item: int) -> int:
        """What must be read and written, with numbers of `item` bytes."""
        numbers = 0
        for into, sizes in self.layers:
            a = (self.columns + self.gates) * into * len(sizes)
            numbers += self.adapters * (a + sum(sizes) * self.columns)
            numbers += self.tokens * (into + 2 * sum(sizes))
        return numbers * item


def cases() -> Iterator[Case]:
    """All rows, at the shapes of Llama 3 8B and Llama 2 13B."""
    for shape in ((4096, 1024, 14336), (5120, 5120, 13824)):
        for tokens in (1, 4, 16, 64, 256):
            for rank in (8, 16, 64):
                for adapters in (1, 8, 32, 128):
                    if adapters <= tokens:
                        yield Case(*shape, rank, tokens, adapters)
            yield Case(*shape, 8, tokens, 1, pack=True)


class Work:
    """One case in the memory of `device`; weights and activations in `dtype`."""

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, by_columns: bool = False
    ) -> None:
        from adapters.kernels.triton_sum import AdapterTables

        self.case = case
        room = max(64, -(-(case.columns + case.gates) // 8) * 8)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype) * scale

        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.weights: list[tuple[list[torch.Tensor], list[torch.Tensor], tuple[int, ...]]] = []
        for into, sizes in case.layers:
            self.layers.append((normal(case.tokens, sum(sizes)), normal(case.tokens, into)))
            a = [normal(case.adapters, 1, room, into, scale=into**-0.5) for _ in sizes]
            # Contiguous by columns, as the worker lays out its slots.
            b = [normal(case.adapters, 1, n, room) for n in sizes]
            if by_columns:
                b = [part.mT.contiguous().mT for part in b]
            if case.pack:
                # Scores without ties or rounding, or the two paths could choose other members.
                order = torch.rand(case.tokens, MEMBERS, device=device).argsort()
                self.layers[-1][1][:, :MEMBERS] = order.to(dtype) / 8
                for side in a:
                    rows = side[0, 0, case.columns : case.columns + MEMBERS]
                    rows.zero_().fill_diagonal_(1)
            self.weights.append((a, b, sizes))
        self.tables: AdapterTables = AdapterTables(
            device, case.tokens, case.tokens, case.adapters, room
        )
        self.tables.write(self._lines(), case.tokens)
        self.groups = gated.bundled(list(self._groups(device)))

    def _lines(self) -> Lines:
        """One request per token; each set has an adapter's weight of 0.7, or its routes."""
        case = self.case
        member = np.full(case.columns, CONSTANT, np.int32)
        if case.pack:
            member = np.repeat(np.arange(MEMBERS, dtype=np.int32), case.rank)
        weight = np.full(case.columns, 1.0 if case.pack else 0.7, np.float32)
        top_k = np.full(case.gates, TOP_K, np.int32)
        gates = np.zeros(case.gates, np.int32), top_k, np.ones(case.gates, np.float32)
        line = Line(weight, member, *gates)
        each = np.arange(case.tokens, dtype=np.int32)
        return Lines((line,) * case.tokens, each % case.adapters, each)

    def _groups(self, device: torch.device) -> Iterator[gated.Group]:
        case = self.case
        for slot in range(case.adapters):
            tokens = torch.arange(slot, case.tokens, case.adapters, device=device)
            ones = torch.ones(len(tokens), device=device)
            rows = case.columns + case.gates
            if not case.pack:
                gate = ones[:, None].repeat(1, case.columns) * 0.7
                yield gated.Group(slot, tokens, case.columns, rows, gate)
                continue
            member = torch.arange(MEMBERS, device=device).repeat_interleave(case.rank)
            top_k = torch.full_like(tokens, TOP_K)
            columns, gates = slice(0, case.columns), slice(case.columns, rows)
            route = gated.Route(columns, gates, member, ones, top_k, TOP_K, ones)
            yield gated.Group(slot, tokens, case.columns, rows, None, (route,))

    def triton(self) -> None:
        """Adds the layer's adapters by the kernels."""
        from adapters.kernels.triton_sum import add_adapters

        for (y, x), (a, b, sizes) in zip(self.layers, self.weights, strict=True):
            add_adapters(y, x, a, b, sizes, self.tables)

    def torch(self) -> None:
        """The same by the torch path."""
        for (y, x), (a, b, sizes) in zip(self.layers, self.weights, strict=True):
            gated.add_adapters(y, x, a, b, sizes, self.groups)

    def check(self) -> None:
        """Raises `AssertionError` if the two paths differ by more than rounding."""
        added = []
        for way in (self.triton, self.torch):
            for y, _ in self.layers:
                y.zero_()
            way()
            added.append([y.clone() for y, _ in self.layers])
        for mine, theirs in zip(*added, strict=True):
            error = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
            if not error < 0.02:  # also if it is no number
                raise AssertionError(f"{self.case}: relative error {error:.3g}")


class Timer:
    """Times work on the current CUDA device, with a cold second-level cache."""

    def __init__(self) -> None:
        size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 256 << 20)
        self._other = torch.empty(size, dtype=torch.int8, device="cuda")

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of `RUNS`."""
        times = []
        for run in range(WARM_UPS + RUNS):
            self._other.zero_()
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if run >= WARM_UPS:
                times.append(float(start.elapsed_time(end)) / 1e3)
        return statistics.median(times)

    def graphed(self, work: Callable[[], object]) -> float:
        """The same, of the work recorded in a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self.seconds(graph.replay)

    def bandwidth(self) -> float:
        """Bytes per second that a copy of 1 GiB reads and writes."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        seconds: float = self.seconds(lambda: target.copy_(source))
        return 2 * source.numel() / seconds


def measure(dtype: torch.dtype, by_columns: bool) -> dict[str, Any]:
    """All results, with what they were measured on."""
    import triton

    timer = Timer()
    bandwidth, rows = timer.bandwidth(), []
    for case in cases():
        work = Work(case, torch.device("cuda"), dtype, by_columns)
        work.check()  # also compiles
        graph = timer.graphed(work.triton)
        least = case.least_bytes(dtype.itemsize)
        rows.append(
            asdict(case)
            | {"bytes": least, "graph_s": graph, "share": least / graph / bandwidth}
            | {"triton_s": timer.seconds(work.triton), "torch_s": timer.seconds(work.torch)}
        )
        print(f"{len(rows)}: {rows[-1]}", file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions | {"cuda": torch.version.cuda},
        "dtype": str(dtype).removeprefix("torch."),
        "b": "by columns" if by_columns else "by rows",
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
    }


def markdown(found: dict[str, Any]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    what = f"{found['gpu']}, {versions}, {found['dtype']}, B {found['b']}"
    lines = [
        "# The adapter sum's Triton kernels",
        "",
        f"{what}. A copy moves {found['copy_bytes_per_s'] / 1e9:.0f} GB/s.",
        "Microseconds per transformer layer (seven modules), cold cache, medians.",
        "",
        "| hidden | tokens | adapters | rank | MB | graph | share of copy | from Python | torch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        sets = f"pack of {MEMBERS}, top {TOP_K}" if row["pack"] else row["adapters"]
        times = [f"{row[name] * 1e6:.0f}" for name in ("graph_s", "triton_s", "torch_s")]
        lines.append(
            f"| {row['hidden']} | {row['tokens']} | {sets} | {row['rank']} "
            f"| {row['bytes'] / 1e6:.1f} | {times[0]} | {row['share']:.2f} "
            f"| {times[1]} | {times[2]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("adapter_kernel_bench"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--by-columns", action="store_true", help="B as the CPU build lays it out")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        sys.exit("There is no NVIDIA GPU here: nothing was measured.")
    found = measure(getattr(torch, options.dtype), options.by_columns)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
