"""Section E: what the kernels take, beside simple baselines in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from load_tests.adapter_kernel_bench import Case, Timer, Work
from load_tests.gpu_check.place import DEVICE, GPU
from load_tests.gpu_check.sections import Clock, Finding, Skipped
from steering.kernels.mix import Rules, mix
from steering.kernels.triton_mix import read_out
from steering.plan import RuleKind

DTYPE = torch.bfloat16


class NoTimer:
    """As `Timer`, where nothing is measured."""

    def seconds(self, _work: Callable[[], object]) -> float:
        return 1.0

    def graphed(self, _work: Callable[[], object]) -> float:
        return 1.0

    def bandwidth(self) -> float:
        return 1.0


@dataclass(frozen=True)
class ReadOut:
    """One step: R rows of V ids over S streams, all with one rule."""

    rows: int
    size: int
    streams: int
    rule: RuleKind

    def least_bytes(self) -> int:
        """What must be read and written: of a plausible row only the stream that decides."""
        read = 1 if self.rule is RuleKind.PLAUSIBLE else self.streams
        return self.rows * self.size * (read * DTYPE.itemsize + 4)


def adapter_cases() -> list[Case]:
    """One layer of Llama 3 8B (all seven modules): requests that decode, and a prompt."""
    if not GPU:
        return [Case(32, 16, 48, 3, 5, 2)]
    shape = (4096, 1024, 14336)
    some = [Case(*shape, 16, tokens, adapters) for tokens, adapters in ((1, 1), (64, 8), (64, 64))]
    return [*some, Case(*shape, 64, 16, 4), Case(*shape, 16, 2048, 4), Case(*shape, 8, 64, 1, True)]


def read_out_cases() -> list[ReadOut]:
    """Qwen 2.5's vocabulary on a GPU."""
    rules = (RuleKind.SUM, RuleKind.PLAUSIBLE, RuleKind.NUCLEUS)
    if not GPU:
        return [ReadOut(2, 300, 3, rule) for rule in rules]
    found = [ReadOut(64, 152_064, 3, rule) for rule in rules]
    return [*found, ReadOut(1, 152_064, 3, RuleKind.SUM), ReadOut(256, 32_000, 3, RuleKind.SUM)]


def products(work: Work) -> None:
    """The adapter sum as plain products, one adapter after the other; a pack: all its members."""
    case = work.case
    for (y, x), (a, b, sizes) in zip(work.layers, work.weights, strict=True):
        start = 0
        for own_a, own_b, size in zip(a, b, sizes, strict=True):
            out = y[:, start : start + size]
            for slot in range(case.adapters):
                rows = slice(slot, None, case.adapters)
                u = x[rows] @ own_a[slot, 0, : case.columns].T
                out[rows] += 0.7 * (u @ own_b[slot, 0, :, : case.columns].T)
            start += size


def kernel_times(clock: Clock) -> Finding:
    """Each case is compared with its baseline before it is timed; times pass no judgement."""
    timer: Any = Timer() if GPU else NoTimer()
    copy, lines = timer.bandwidth(), []
    cases: list[Case | ReadOut] = [*adapter_cases(), *read_out_cases()]
    for case in clock.cases(cases):
        line = _adapter_line(case, timer) if isinstance(case, Case) else _read_out_line(case, timer)
        seconds = line["graph_ms"] / 1e3
        line |= {"gb_per_s": line["bytes"] / seconds / 1e9}
        lines.append(line | {"share_of_copy": line["bytes"] / seconds / copy})
    if not GPU:
        raise Skipped(f"{len(lines)} cases agree with torch; interpreted kernels are not timed")
    some = {kind: [own for own in lines if own["kind"] == kind] for kind in ("sum", "read-out")}
    said = "; ".join(
        f"{kind}: " + ", ".join(f"{o['name']} {o['graph_ms']:.3f} ms" for o in own)
        for kind, own in some.items()
        if own
    )
    said += f"; of a copy's {copy / 1e9:.0f} GB/s " + ", ".join(
        f"{own['share_of_copy']:.0%}" for own in lines
    )
    return Finding(True, said, {"copy_gb_per_s": copy / 1e9, "cases": lines})


def _line(kind: str, name: str, least: int, timer: Any, ways: dict[str, Any]) -> dict[str, Any]:
    found = {"kind": kind, "name": name, "bytes": least}
    found["graph_ms"] = 1e3 * timer.graphed(ways["triton"])
    return found | {f"{way}_ms": 1e3 * timer.seconds(work) for way, work in ways.items()}


def _adapter_line(case: Case, timer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    work = Work(case, DEVICE, DTYPE)
    work.check()  # also compiles
    name = f"{case.tokens} tokens, " + ("a pack" if case.pack else f"{case.adapters} of rank ")
    name += "" if case.pack else str(case.rank)
    ways = {"triton": work.triton, "torch": work.torch, "matmul": lambda: products(work)}
    if not case.pack:
        _same_products(work)
    return _line("sum", name, case.least_bytes(DTYPE.itemsize), timer, ways)


def _same_products(work: Work) -> None:
    """Raises `AssertionError` if the plain products are not what the kernels add."""
    added = []
    for way in (work.triton, lambda: products(work)):
        for y, _ in work.layers:
            y.zero_()
        way()
        added.append(torch.cat([y.float().flatten() for y, _ in work.layers]))
    error = float((added[0] - added[1]).norm() / added[1].norm())
    if not error < 0.02:
        raise AssertionError(f"{work.case}: relative error {error:.3g} against plain products")


def _read_out_line(case: ReadOut, timer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    width = -(-case.size // 64) * 64
    tables = [torch.randn(case.rows, width, device=DEVICE, dtype=DTYPE) * 4 for _ in range(3)]
    logits = [table[:, : case.size] for table in tables[: case.streams]]
    coef = torch.tensor([[1.0, 0.7, -0.7][: case.streams]], device=DEVICE).repeat(case.rows, 1)
    number = {RuleKind.PLAUSIBLE: 0.1, RuleKind.NUCLEUS: 0.95}.get(case.rule, 0.0)
    line = torch.tensor([float(case.rule), 0.0, number, 0.0, 0.0], device=DEVICE)
    searched = case.rule is RuleKind.NUCLEUS
    rules = Rules.of(line.repeat(case.rows, 1))
    rules = rules._replace(kinds=[case.rule], searched=searched, shared=False)
    rules_of = None if case.rule is RuleKind.SUM else rules

    def by_kernels() -> torch.Tensor:
        return read_out(logits, coef, rules_of, lacking=False)[0]

    def by_torch() -> torch.Tensor:
        return mix([own.float() for own in logits], coef, rules_of, lacking=False)

    mine, theirs = by_kernels(), by_torch()
    # An id on the rim of a mask may fall on either side by rounding.
    far = int(((mine - theirs).abs() > 1e-3 + 1e-5 * theirs.abs()).sum())
    if far > 2 * case.rows or not bool(mine.isfinite().all()):
        raise AssertionError(f"{case}: {far} scores differ from torch's")
    name = f"{case.rule.name.lower()} {case.rows} × {case.size}"
    ways = {"triton": by_kernels, "torch": by_torch}
    return _line("read-out", name, case.least_bytes(), timer, ways)
