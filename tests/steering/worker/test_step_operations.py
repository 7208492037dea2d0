"""No step makes the host wait for a device; the variants of its kernels are few, and made early."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from steering.plan import Report
from steering.worker.plan.step_plan import Classes
from steering.worker.readout.readout import Readout
from steering.worker.readout.triton import TritonReadout
from tests.steering.worker import step_operations
from tests.steering.worker.step_operations import (
    DRAFTS,
    PLANS,
    VALUED,
    Recorder,
    Refused,
    pretended,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)

PAGE = Path(__file__).parents[3] / "docs" / "internals" / "read-out-operations.md"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("report", "drafts"), [("off", 0), ("tokens", DRAFTS)])
def test_nothing_waits_on_the_torch_path(name: str, report: Report, drafts: int) -> None:
    """On a GPU without Triton; the page has the path with it."""
    drafts = 0 if name in VALUED else drafts
    assert step_operations.counted(Readout, PLANS[name], report, drafts)["operations"]


def test_requests_with_values_must_not_verify_drafts() -> None:
    """Only their last token's candidates would be valued."""
    with pytest.raises(RuntimeError, match=r"requests with values verify drafts: \['1', '2'\]"):
        step_operations.step_of(PLANS["values"], drafts=DRAFTS)


def test_the_page_has_what_is_counted() -> None:
    command = (
        "python -m tests.steering.worker.step_operations > docs/internals/read-out-operations.md"
    )
    assert PAGE.read_text() == step_operations.page(), command


def _mix_devices(x: torch.Tensor) -> None:
    x.index_select(0, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x.cpu(),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(4),
        lambda x: x.copy_(torch.ones(4)),
        _mix_devices,
    ],
)
def test_what_waits_is_refused(work: Callable[[torch.Tensor], Any]) -> None:
    recorder = Recorder(pretended())
    with FakeTensorMode(), recorder:
        x = torch.ones(4, device=recorder.device)
        with pytest.raises((Refused, DataDependentOutputException, DynamicOutputShapeException)):
            work(x)


class Launches:
    """Stands in for the kernels and keeps the variant that each launch would compile."""

    def __init__(self) -> None:
        self.seen: set[tuple[Any, ...]] = set()

    def kernel(self, name: str) -> Any:
        def launch(*args: Any, **static: Any) -> None:
            self.seen.add((name, _key(args), *sorted(static.items())))

        kernel = mock.MagicMock()
        kernel.__getitem__.return_value = launch
        return kernel


def _key(argument: Any) -> Any:
    """What Triton compiles a variant for: dtypes, whether 16 divides a number, whether it is 1."""
    if isinstance(argument, tuple):
        return tuple(map(_key, argument))
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return "1" if argument == 1 else argument % 16 == 0


@pytest.mark.parametrize("size", [160, 1030])
def test_the_variants_of_kernels_are_few_and_compiled_before_serving(size: int) -> None:
    from steering.kernels import triton_mix

    launches = Launches()
    cpu = torch.device("cpu")
    recorder = Recorder("cpu")
    rng = np.random.default_rng(size)
    with ExitStack() as stack:
        for name in step_operations.KERNELS:
            kernel = launches.kernel(name)
            stack.enter_context(mock.patch.object(triton_mix, name, kernel))
        stack.enter_context(mock.patch.object(step_operations, "SIZE", size))
        readout = step_operations.scoring_of(TritonReadout, recorder, "cpu").readout
        for vocabulary in (*readout.vocabularies, readout):
            ids = getattr(vocabulary, "unshared", getattr(vocabulary, "padded", None))
            if ids is not None:
                ids.zero_()
        assert isinstance(readout, TritonReadout)
        readout.warm_up(cpu)
        warm = set(launches.seen)
        rules = [*Classes.all(1).rules]
        for _ in range(150):
            rows = int(rng.integers(1, 40))
            kinds = frozenset(kind for kind in rules if rng.random() < 0.3)
            classes = Classes(
                (True, *map(bool, rng.random(3) < 0.5)),
                kinds,
                (0,) if kinds and rng.random() < 0.5 else (),
                bool(rng.random() < 0.3),
            )
            readout.ends.show([(), (7,)][: int(rng.integers(1, 3))])
            some = torch.arange(int(rng.integers(1, rows + 1)))
            hidden = torch.zeros(rows, readout.layout.width, dtype=readout.layout.dtype)
            readout(hidden, classes, some if rng.random() < 0.4 else None)
    assert launches.seen == warm
    assert 20 < len(warm) <= triton_mix.VARIANTS
