"""The read-out's Triton kernels against the definition, over sizes and scores that hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.kernels import mix as torch_mix
from steering.kernels import triton_mix
from steering.kernels.mix import Rules
from steering.kernels.reference import Scores, measure_reference
from steering.kernels.triton_mix import Additions, marks, read_out
from steering.plan import Rule, RuleKind
from tests.steering.kernels.rows import Batch

TOLERANCE = 2e-4
"""float32 against float64 on scores of magnitude 10 to 100; inputs are exact in their dtype."""

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so what a kernel reads before it was written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(found: torch.Tensor, want: Scores, what: object) -> None:
    got = found.double().numpy()
    assert np.array_equal(np.isneginf(got), np.isneginf(want)), what
    finite = np.isfinite(want)
    assert np.allclose(got[finite], want[finite], atol=TOLERANCE), what


@pytest.mark.parametrize("way", [torch_mix.mix, triton_mix.mix], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("rows", "streams", "size", "dtype", "hostile"),
    [
        (10, 2, 1, FLOAT32, False),
        (15, 3, 63, FLOAT32, True),
        (10, 1, 100, BFLOAT16, True),
        (10, 2, 1500, FLOAT32, False),
        (15, 3, 2500, BFLOAT16, True),
        (10, 4, 1500, FLOAT16, True),
        (20, 3, 2533, BFLOAT16, False),
        (20, 4, 2533, FLOAT32, True),
    ],
)
def test_every_row_agrees_with_the_definition(
    way: Callable[..., torch.Tensor],
    rows: int,
    streams: int,
    size: int,
    dtype: torch.dtype,
    hostile: bool,
) -> None:
    batch = Batch.draw(np.random.default_rng(size + rows), rows, streams, size, dtype, hostile)
    logits = batch.logits(dtype)
    if way is torch_mix.mix:
        logits = [s.float() for s in logits]
    found = way(logits, *batch.control())
    for row in range(rows):
        close(found[row], batch.wanted(row), batch.recipe(row))


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "coarse"),
    [
        (6, 1500, BFLOAT16, 2.0),
        (5, 2100, FLOAT32, 4.0),
        (17, 2500, FLOAT16, 1.0),
        (4, 1100, FLOAT32, 100.0),
    ],
)
def test_nuclei_that_end_among_equals(
    rows: int, size: int, dtype: torch.dtype, coarse: float
) -> None:
    """Equal scores in several blocks, of which some are inside: those with the lowest ids."""
    rng = np.random.default_rng(size)
    batch = Batch.draw(rng, rows, 3, size, dtype, coarse=coarse)
    params = [float(np.float32(p)) for p in rng.uniform(0.01, 0.999, rows)]
    batch.rules = [Rule(RuleKind.NUCLEUS, param=p) for p in params]
    found = triton_mix.mix(batch.logits(dtype), *batch.control())
    cut = 0
    for row in range(rows):
        close(found[row], batch.wanted(row), batch.recipe(row))
        of_k = batch.scores[batch.stream[row]][row]
        cut += len(np.unique(of_k)) < size // 10
    assert cut == rows


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_zeros_of_both_signs_are_equal(dtype: torch.dtype) -> None:
    scores = torch.zeros(1, 1100, dtype=dtype)
    scores[:, ::2] = -0.0
    rules = Rules.of(torch.tensor([[RuleKind.NUCLEUS, 0, 0.8995, 0, 0]]))
    found = triton_mix.mix([scores, torch.randn(1, 1100).to(dtype)], torch.ones(1, 2), rules)
    assert torch.count_nonzero(found) == torch.count_nonzero(found[:, :990]) == 990


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    batch = Batch.draw(rng, 14, 3, 2100, BFLOAT16, hostile=True)
    logits = batch.logits(BFLOAT16)
    coef, rules = batch.control()
    together = triton_mix.mix(logits, coef, rules)
    for row in range(14):
        own = torch.tensor([row])
        alone = triton_mix.mix([s[own] for s in logits], coef[own], rules.take(own))
        assert torch.equal(alone[0], together[row])


def test_a_stream_that_no_row_uses_may_be_left_out() -> None:
    batch = Batch.draw(np.random.default_rng(4), 10, 3, 1100, FLOAT32)
    batch.coef[:, 1], batch.coef[:, 0] = 0, 1.5
    batch.stream = [2 if c else 0 for c in batch.coef[:, 2]]
    for row, k in enumerate(batch.stream):
        if batch.rules[row].kind is RuleKind.SELECT:
            batch.coef[row, 2 - k] = 1.0
    first, _, last = batch.logits(FLOAT32)
    found = triton_mix.mix([first, None, last], *batch.control())
    for row in range(10):
        close(found[row], batch.wanted(row), batch.recipe(row))


SIZE = 2088
PADDED = np.array([7, *range(2080, SIZE)])
SHORT = 2070
"""Where the second stream's table ends; the third's is wider than the base's."""
UNSHARED = [PADDED, np.array([3, *PADDED]), np.array([3, 1030, 1031, *range(SHORT, SIZE)])]
UNSHARED[2] = np.union1d(UNSHARED[2], PADDED)
ENDS = [0, 2069]
CANDIDATES = 5


def served(rng: np.random.Generator, rows: int, dtype: torch.dtype) -> tuple[Batch, ...]:
    """Rows as the worker has them, and as the definition sees them."""
    raw = Batch.draw(rng, rows, 3, SIZE, dtype)
    raw.coef[0], raw.rules[0] = [1, 0, 0], Rule()
    raw.coef[5], raw.rules[5] = [1, 0, 0], Rule()
    raw.coef[10], raw.rules[10] = [0, 1.5, 0], Rule()  # reports, without the base
    raw.ends = [ENDS, [*ENDS, 5, 1040]]
    seen = replace(raw, scores=list(raw.scores))
    for i, lost in enumerate(UNSHARED):
        seen.scores[i] = raw.scores[i].copy()
        seen.scores[i][:, lost] = -np.inf
    return raw, seen


def own_tables(batch: Batch, dtype: torch.dtype) -> list[torch.Tensor]:
    """The streams' scores in tables of their own widths; NaN on rows that do not use them."""
    logits = [torch.tensor(batch.scores[0]).to(dtype)]
    for i, width in ((1, SIZE + 40), (2, SHORT)):
        table = torch.full((len(batch.coef), SIZE + 40), torch.nan, dtype=dtype)
        rows = np.flatnonzero(batch.coef[:, i])
        table[torch.tensor(rows), :SIZE] = torch.tensor(batch.scores[i][rows]).to(dtype)
        logits.append(table[:, :width] if width != SHORT else table[:, :width].contiguous())
    return logits


def added(rng: np.random.Generator, rows: int) -> Additions:
    """What some rows have added to ids that are tokens."""
    tokens = np.setdiff1d(np.arange(SIZE), PADDED)
    ids, numbers = torch.zeros(rows, CANDIDATES), torch.zeros(rows, CANDIDATES)
    for row in range(2, rows, 3):
        count = int(rng.integers(1, CANDIDATES + 1))
        ids[row, :count] = torch.tensor(rng.choice(tokens, count, replace=False)).float()
        numbers[row, :count] = torch.tensor(rng.normal(scale=3.0, size=count)).float()
    both = torch.stack([ids, numbers], 1).flatten(1)  # as they lie in the worker
    return Additions(both[:, :CANDIDATES], both[:, CANDIDATES:])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("rows", [11, 17])
def test_what_the_worker_asks_for_in_one(rows: int, dtype: torch.dtype) -> None:
    """Tables of other widths, ids not shared, padding, additions, reports, rows of the base."""
    rng = np.random.default_rng(rows)
    raw, seen = served(rng, rows, dtype)
    logits = own_tables(raw, dtype)
    coef, rules = raw.control()
    more = added(rng, rows)
    reported = torch.tensor([float(row % 4 != 3) for row in range(rows)])
    lost = [torch.tensor(ids) for ids in UNSHARED]
    z, measures = read_out(
        logits,
        coef,
        rules,
        True,
        marks(SIZE, lost, z_device := torch.device("cpu")),
        more,
        reported,
    )
    assert measures is not None and z.device == z_device
    for row in range(rows):
        want = seen.wanted(row)
        if row in (0,):
            assert torch.equal(z[row], logits[0][row].float())
            want = raw.scores[0][row]
        else:
            want[PADDED] = -np.inf
        np.add.at(want, more.ids[row].long().numpy(), more.added[row].double().numpy())
        close(z[row], want, raw.recipe(row))
        got = [float(numbers[row]) for numbers in measures]
        if not reported[row]:
            assert not any(got)
            continue
        kl, *choices = measure_reference(want, raw.scores[0][row])
        masses = [np.logaddexp.reduce(s) for s in (want, raw.scores[0][row])]
        assert got[:3] == pytest.approx([kl, *masses], abs=TOLERANCE)
        assert got[3:] == choices


def test_plain_sums_over_one_vocabulary() -> None:
    """What most steps are: no rule, nothing lacking; a row of the base keeps its padding."""
    rng = np.random.default_rng(9)
    batch = Batch.draw(rng, 6, 3, SIZE, BFLOAT16)
    batch.rules, batch.coef[2] = [Rule()] * 6, [1, 0, 0]
    logits = batch.logits(BFLOAT16)
    everyone = [torch.tensor(PADDED)] * 3
    z, measures = read_out(
        logits,
        batch.control()[0],
        None,
        False,
        marks(SIZE, everyone, torch.device("cpu")),
    )
    assert measures is None and torch.equal(z[2], logits[0][2].float())
    for row in (0, 1, 3, 4, 5):
        want = batch.wanted(row)
        want[PADDED] = -np.inf
        close(z[row], want, batch.recipe(row))


def test_random_bits_do_no_harm() -> None:
    """The engine's warm-up passes anything as control; the worker only makes it finite."""
    rng = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (40, 11), generator=rng, dtype=torch.int64)
    flat = torch.nan_to_num(bits.to(torch.int32).view(FLOAT32), 0.0, 0.0, 0.0)
    flat[:20, 3] = torch.arange(20) % 4  # real rules with impossible numbers
    logits = [torch.randn(40, 1100, generator=rng) for _ in range(3)]
    rules = Rules.of(flat[:, 3:9])
    rules = rules._replace(stream=rules.stream.clamp(0, 2))
    more = Additions(flat[:, 9:10], flat[:, 10:11])
    z, _ = read_out(logits, flat[:, :3], rules, additions=more)
    assert z.shape == (40, 1100)
