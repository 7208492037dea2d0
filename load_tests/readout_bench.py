"""What the Triton kernels of the read-out cost on an NVIDIA GPU, at real shapes.

    python -m load_tests.readout_bench --out results      # results.json and results.md
    python -m load_tests.readout_bench --interpret        # no GPU: do both paths agree, when small?

One line is one step: so many rows, all with the same rule, over so many streams' scores, as the
unembeddings leave them (rows as far apart as a table padded to 64 has them). Scores are normal with
a deviation of 4. Each result is checked against the torch path before it is timed, and before every
timed run the GPU's second-level cache is overwritten; in a server the scores were written just
before, and part of them is still in it.

Times are medians: of the launches in a CUDA graph, of the same launches from Python, and of the
worker's torch path from Python. The share of the bandwidth is that of the first against a copy in
the same run; the bytes are those that must move in any case (`Case.least_bytes`).

Without an NVIDIA GPU nothing is measured and nothing is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from load_tests.adapter_kernel_bench import Timer
from steering.plan import Gate, Rule, RuleKind
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import Layout
from steering.worker.plan.step_plan import Classes
from steering.worker.readout.parts import Reading, Vocabulary
from steering.worker.readout.readout import Readout

PARAMS = {RuleKind.PLAUSIBLE: 0.1, RuleKind.NUCLEUS: 0.95, RuleKind.SELECT: 0.5}
ENDS = (2, 5)
HIDDEN = 8
"""Columns of the hidden states: the unembeddings are no part of what is measured."""


@dataclass(frozen=True)
class Case:
    """One line.

    Args:
        size: V.
        rows: R.
        streams: S.
        rule: of all rows; a `SELECT` is hard, by a head whose gate is open.
    """

    size: int
    rows: int
    streams: int
    rule: RuleKind = RuleKind.SUM

    def least_bytes(self, item: int) -> int:
        """What must be read and written, with scores of `item` bytes: z, and most streams once.

        Where one stream decides which few ids are left, the others need not be read.
        """
        one = self.rule in (RuleKind.PLAUSIBLE, RuleKind.SELECT)
        return self.rows * self.size * ((1 if one else self.streams) * item + 4)


def cases() -> Iterator[Case]:
    """All lines: the vocabularies of Llama 2, GPT-2, Llama 3 and Qwen 2.5 (7B)."""
    for size in (32000, 50257, 128256, 152064):
        for rows in (1, 4, 16, 64, 256):
            for streams in (2, 3, 4):
                yield Case(size, rows, streams)
            for rule in RuleKind:
                if rule is not RuleKind.SUM:
                    yield Case(size, rows, 3, rule)


def _giving(logits: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An unembedding that has been done."""
    return lambda _hidden: logits


class Work:
    """One case in the memory of `device`; scores in `dtype`."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        from steering.kernels.triton_mix import marks

        self.case = case
        padded = -(-case.size // 64) * 64
        tables = [
            torch.randn(case.rows, padded, device=device, dtype=dtype).mul_(4)
            for _ in range(case.streams)
        ]
        self.logits = [table[:, : case.size] for table in tables]
        ends = EndSets(ENDS, case.size)
        layout = Layout((HIDDEN,) * case.streams, torch.float32)
        coef = [1.0, *(0.7 * (-1) ** i for i in range(case.streams - 1))]
        select = case.rule is RuleKind.SELECT
        k = case.streams - 1 if select else 0
        rule = Rule(case.rule, gate=Gate.HEAD if select else Gate.CONSTANT, hard=select)
        own = [float(rule.kind), k, PARAMS.get(rule.kind, 0.0), 0.0, rule.options, 0.0, 0.0]
        control = [*coef, *own]
        self.hidden = torch.zeros(case.rows, layout.width, device=device)
        row = torch.tensor(control, dtype=torch.float32, device=device)
        layout.write_control(self.hidden, row.repeat(case.rows, 1))
        odds = torch.ones(case.rows, device=device)
        self.readout = Readout(
            layout,
            [_giving(own) for own in self.logits],
            [Vocabulary()] * case.streams,
            None,
            (Reading(0, lambda _hidden: odds),) if select else (),
            ends,
        )
        read = layout.read_control(self.hidden)
        self.coef = read.coef.contiguous()
        kinds = frozenset({case.rule} - {RuleKind.SUM})
        heads = (0,) if select else ()
        searched = case.rule is RuleKind.NUCLEUS
        self.classes = Classes((True,) * case.streams, kinds, heads, searched=searched)
        self.rules = None
        self.marks = None
        if case.rule is not RuleKind.SUM:
            self.rules = self.readout._rules(read, self.classes, odds)
            self.marks = marks(case.size, [None] * case.streams, device)

    def triton(self) -> torch.Tensor:
        """The scores by the kernels."""
        from steering.kernels.triton_mix import read_out

        z, _ = read_out(self.logits, self.coef, self.rules, False, self.marks)
        return z

    def torch(self) -> torch.Tensor:
        """The same by the worker's torch path."""
        mixed = self.readout(self.hidden, self.classes)
        assert mixed is not None
        return mixed.z

    def check(self) -> None:
        """Raises `AssertionError` if the two paths differ by more than rounding."""
        mine, theirs = self.triton(), self.torch()
        # An id on the rim of a mask may fall on either side by rounding.
        differ = (mine.isneginf() != theirs.isneginf()).sum().item()
        finite = mine.isfinite() & theirs.isfinite()
        far = ((mine - theirs).abs() > 1e-3)[finite].sum().item()
        if differ + far > 2 * self.case.rows or not finite.any():
            raise AssertionError(f"{self.case}: {differ + far} scores differ")


def measure(dtype: torch.dtype) -> dict[str, Any]:
    """All results, with what they were measured on."""
    import triton

    timer = Timer()
    bandwidth, lines = timer.bandwidth(), []
    for case in cases():
        work = Work(case, torch.device("cuda"), dtype)
        work.check()  # also compiles
        graph = timer.graphed(work.triton)
        least = case.least_bytes(dtype.itemsize)
        lines.append(
            asdict(case)
            | {"rule": case.rule.name, "bytes": least}
            | {"graph_s": graph, "share": least / graph / bandwidth}
            | {"triton_s": timer.seconds(work.triton), "torch_s": timer.seconds(work.torch)}
        )
        print(f"{len(lines)}: {lines[-1]}", file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions | {"cuda": torch.version.cuda},
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_s": bandwidth,
        "lines": lines,
    }


def markdown(found: dict[str, Any]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    copy = found["copy_bytes_per_s"] / 1e9
    page = [
        "# The read-out's Triton kernels",
        "",
        f"{found['gpu']}, {versions}, {found['dtype']}. A copy moves {copy:.0f} GB/s.",
        "Microseconds per step, cold cache, medians.",
        "",
        "| rule | V | rows | streams | MB | graph | share of copy | from Python | torch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in found["lines"]:
        times = [f"{line[name] * 1e6:.0f}" for name in ("graph_s", "triton_s", "torch_s")]
        page.append(
            f"| {line['rule'].lower()} | {line['size']} | {line['rows']} | {line['streams']} "
            f"| {line['bytes'] / 1e6:.1f} | {times[0]} | {line['share']:.2f} "
            f"| {times[1]} | {times[2]} |"
        )
    return "\n".join(page) + "\n"


def agree() -> None:
    """Checks both paths against each other in Triton's interpreter, at a small size."""
    torch.manual_seed(0)
    for rule in RuleKind:
        Work(Case(1500, 2, 3, rule), torch.device("cpu"), torch.bfloat16).check()
        print(f"{rule.name.lower()}: the kernels agree with the torch path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("readout_bench"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--interpret", action="store_true", help="a small check without a GPU")
    options = parser.parse_args()
    if options.interpret:
        # Triton reads it when it is imported, which nothing has done yet.
        os.environ["TRITON_INTERPRET"] = "1"
        agree()
        return
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("There is no NVIDIA GPU here: nothing was measured.")
        return
    found = measure(getattr(torch, options.dtype))
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
