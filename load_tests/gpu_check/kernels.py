"""Sections A and B: the Triton kernels against the float64 definitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adapters.kernels.lines import Lines
from adapters.kernels.triton_sum import AdapterTables, add_adapters
from load_tests.gpu_check.place import DEVICE, GPU, dtype_name, unwritten_is_nan
from load_tests.gpu_check.sections import Clock, Finding
from steering.kernels.reference import Scores, measure_reference
from steering.kernels.triton_mix import read_out
from steering.plan import RuleKind
from tests.adapters.mixed import KINDS, Layer, Part, Set
from tests.adapters.steps import SETS, TOLERANCE, step
from tests.steering.kernels.rows import Batch

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32

LARGE: dict[int, Set] = {
    0: (Part((16,)),),
    1: (Part((64,), False, (True,), (True,)), Part((8,))),
    2: (Part((8,) * 28, routed=True),),
    3: (Part((32,)), Part((4,) * 6, True, (True,) * 6, (False,) * 6)),
}
"""LoRA, DoRA-like with a constant and a diagonal, the pack that was released, and a mixture."""

# --- A: the adapter sum -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One layer and step: its sets with a slot's room, and how many rows are compared."""

    sets: dict[int, Set]
    tokens: int
    into: int
    sizes: tuple[int, ...]
    room: int = 40
    compared: int = 200


def shapes() -> list[Shape]:
    """Small ones everywhere; those of Llama 3 8B on a GPU, a few rows of which are compared."""
    qkv = (4096, 1024, 1024)
    small = [
        Shape(SETS, 140, 129, (31, 70)) if GPU else Shape(SETS, 5, 33, (9, 7)),
        Shape(KINDS, 5, 64, (16, 8)),
    ]
    large = [Shape(LARGE, tokens, 4096, qkv, 256, 16) for tokens in (16, 1100)]
    return [*large, Shape(LARGE, 64, 14336, (4096,), 256, 16), *small] if GPU else small


def adapter_sum(clock: Clock) -> Finding:
    """Every dtype and shape; the error is a share of the layer's largest value."""
    dtypes = (BFLOAT16, FLOAT32, FLOAT16)
    cases = [(shape, dtype) for shape in shapes() for dtype in dtypes]
    worst: dict[torch.dtype, float] = {}
    touched = 0
    with unwritten_is_nan():
        for shape, dtype in clock.cases(cases):
            error, bare = _adapter_error(shape, dtype)
            # Written so that NaN stays.
            worst[dtype] = error if not error <= worst.get(dtype, 0.0) else worst[dtype]
            touched += bare
    passed = all(error <= TOLERANCE[dtype] for dtype, error in worst.items()) and not touched
    figures = {dtype_name(dtype): error for dtype, error in worst.items()}
    said = ", ".join(f"{error:.1e} {name}" for name, error in figures.items())
    if touched:
        said += f"; {touched} rows without an adapter changed"
    limits = {dtype_name(dtype): limit for dtype, limit in TOLERANCE.items()}
    return Finding(passed, f"worst error {said}", {"worst": figures, "allowed": limits})


def _adapter_error(shape: Shape, dtype: torch.dtype) -> tuple[float, int]:
    """The error, and how many rows without an adapter do not have the base's bits."""
    across = shape.into % 2 == 1
    layer = Layer(
        shape.into, shape.sizes, shape.sets, dtype, 4, shape.room, shape.tokens, True, across
    )
    lines, asks = step(layer, shape.tokens, 9, bare=0.3 if shape.tokens > 1 else 0.0)
    x = layer.draw(shape.tokens, shape.into)
    base = layer.base(x)
    tables = AdapterTables(DEVICE, shape.tokens + 3, 20, layer.slots, layer.room)
    tables.write(lines, shape.tokens)
    y = base.to(DEVICE, copy=True)
    a, b = ([part.to(DEVICE) for part in side] for side in (layer.a, layer.b))
    add_adapters(y, torch.from_numpy(x).to(dtype).to(DEVICE), a, b, layer.sizes, tables)
    found = y.cpu()
    bare = torch.from_numpy(lines.tokens < 0)
    rows = np.sort(layer.random.permutation(shape.tokens)[: shape.compared])
    some = Lines(lines.lines, lines.slots, lines.tokens[rows])
    want = layer.wanted(x[rows], some, asks)
    error = np.abs(found[torch.from_numpy(rows)].double().numpy() - want).max()
    changed = (found[bare] != base[bare]).any(1).sum()
    return float(error / max(1.0, np.abs(want).max())), int(changed)


# --- B: the read-out ----------------------------------------------------------------------------

ALLOWED = 2e-4
"""Nats, float32 against float64 on scores of magnitude 10; of larger ones 1e-5 of their size."""

RIM = 2
"""Ids of a row on the rim of a nucleus that may fall on either side by rounding, on large
vocabularies."""


@dataclass(frozen=True)
class Scored:
    """One batch; a hostile one has −∞ anywhere and no reports."""

    rows: int
    streams: int
    size: int
    dtype: torch.dtype
    hostile: bool = False


def batches() -> list[Scored]:
    """Vocabularies of Qwen 2.5, Llama 3 and Llama 2; odd sizes."""
    if GPU:
        return [
            Scored(20, 3, 152_064, BFLOAT16),
            Scored(20, 3, 128_256, FLOAT32),
            Scored(15, 3, 32_003, FLOAT16, hostile=True),
            Scored(5, 4, 50_257, BFLOAT16, hostile=True),
            Scored(10, 2, 63, FLOAT32, hostile=True),
        ]
    return [Scored(5, 2, 1063, FLOAT32), Scored(5, 3, 300, BFLOAT16, hostile=True)]


@dataclass
class Tally:
    """What is known of the rows so far."""

    worst: dict[str, float]
    report: float = 0.0
    wrong: int = 0
    rim: int = 0

    def scores(self, kind: RuleKind, got: Scores, want: Scores) -> None:
        """Takes one row."""
        never = np.isneginf(got) != np.isneginf(want)
        finite = np.isfinite(want) & ~never
        error = np.abs(got[finite] - want[finite])
        far = ~(error <= ALLOWED + 1e-5 * np.abs(want[finite]))
        differ = int(far.sum())
        if kind is RuleKind.NUCLEUS and differ <= RIM and want.size > 10_000:
            self.rim, differ, error = self.rim + differ, 0, error[~far]
        self.wrong += differ + int(never.sum())
        largest = float(error.max(initial=0.0))
        if not largest <= self.worst.get(kind.name, 0.0):
            self.worst[kind.name] = largest

    def measured(self, got: list[float], want: Scores, base: Scores) -> None:
        """Takes one row's report: KL, two masses, two choices."""
        kl, _, base_choice = measure_reference(want, base)
        masses = [float(np.logaddexp.reduce(s)) for s in (want, base)]
        exact = np.array([kl, *masses])
        errors = np.abs(np.array(got[:3]) - exact)
        far = int((~(errors <= 10 * ALLOWED + 1e-5 * np.abs(exact))).sum())
        error = float(errors.max())
        self.report = error if not error <= self.report else self.report
        # Two steered scores may be equal but for rounding.
        near = want[int(got[3])] >= want.max() - ALLOWED
        self.wrong += far + (not near) + (got[4] != base_choice)


def read_outs(clock: Clock) -> Finding:
    """All rules in every batch, with reports where there is no −∞."""
    tally = Tally({})
    with unwritten_is_nan():
        for case in clock.cases(batches()):
            _score(case, tally)
    said = ", ".join(f"{error:.1e} {kind.lower()}" for kind, error in tally.worst.items())
    said = f"worst error {said}, {tally.report:.1e} reports"
    if tally.wrong:
        said += f"; {tally.wrong} numbers wrong"
    data = {"worst": tally.worst, "reports": tally.report, "on the rim": tally.rim}
    return Finding(not tally.wrong, said, data | {"wrong": tally.wrong, "allowed": ALLOWED})


def _score(case: Scored, tally: Tally) -> None:
    rng = np.random.default_rng(case.size + case.rows)
    batch = Batch.draw(rng, case.rows, case.streams, case.size, case.dtype, case.hostile)
    if not case.hostile:
        batch.coef[:, 0] = np.where(batch.coef[:, 0] == 0, 0.5, batch.coef[:, 0])
    coef, rules = batch.control(DEVICE)
    reported = None if case.hostile else torch.ones(case.rows, device=DEVICE)
    logits = [own.to(DEVICE) for own in batch.logits(case.dtype)]
    z, measures = read_out(logits, coef, rules, reported=reported)
    found = z.cpu().double().numpy()
    for row in range(case.rows):
        want = batch.wanted(row)
        tally.scores(batch.rules[row].kind, found[row], want)
        if measures is not None:
            got = [float(numbers[row]) for numbers in measures]
            tally.measured(got, want, batch.scores[0][row])
