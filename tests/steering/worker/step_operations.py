"""Counts the device operations of a step's read-out, without a device.

    python -m tests.steering.worker.step_operations > docs/internals/read-out-operations.md

Tensors are fake (they have shapes and no numbers) on a device that only exists by name, so whatever
needs a number on the host, or a shape that depends on numbers, fails where it stands. Kernels are
counted, not run.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steering.plan import BASE, Gate, Report, Rule, RuleKind, SteeringPlan, Values
from steering.wire import SteeringPayload
from steering.worker.plan import ends as ends_module
from steering.worker.plan import staging as staging_module
from steering.worker.plan.batches import Candidates, Schedule
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import Layout
from steering.worker.plan.request_state import BatchTables, request_state
from steering.worker.plan.staging import Staging
from steering.worker.plan.step_plan import StepPlan, plan_step
from steering.worker.readout import reporter as reporter_module
from steering.worker.readout import watch as watch_module
from steering.worker.readout.parts import Reading, Vocabulary
from steering.worker.readout.readout import Readout
from steering.worker.readout.reporter import Reporter
from steering.worker.readout.scoring import Scoring
from steering.worker.readout.triton import TritonReadout
from steering.worker.readout.watch import Watch
from steering.worker.step.values import ValuePlan, ValueStreams, candidates_of

SIZE, HIDDEN, TOP_K, DRAFTS = 160, 16, 5, 2
NAMES = (BASE, "chat", "plain", "good")
"""The last is a value stream; the head `critic` reads `chat`."""
KERNELS = ("first", "narrow", "finish", "compare")
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")

SUM = (("chat", 0.5), ("plain", -0.5))
PLANS: dict[str, tuple[SteeringPlan | None, ...]] = {
    "the base alone": (None, None),
    "sums of the same streams": (SteeringPlan("m", ((BASE, 1.0), *SUM)),) * 2,
    "a sum beside plain requests": (None, SteeringPlan("m", ((BASE, 1.0), SUM[0])), None),
    "plausible ids": (None, SteeringPlan("m", SUM, Rule(RuleKind.PLAUSIBLE, "chat", 0.1))),
    "a nucleus": (None, SteeringPlan("m", SUM, Rule(RuleKind.NUCLEUS, "chat", 0.9))),
    "the ten likely ids": (
        None,
        SteeringPlan("m", SUM, Rule(RuleKind.PLAUSIBLE, "chat", 1, count=10)),
    ),
    "one of two streams": (
        None,
        SteeringPlan("m", SUM, Rule(RuleKind.SELECT, "plain", 0.5, "critic", 0, Gate.HEAD, True)),
        SteeringPlan("m", SUM, Rule(RuleKind.SELECT, "plain", 0.25)),
    ),
    "ids that two streams share": (
        None,
        SteeringPlan("m", SUM, Rule(RuleKind.SELECT, "plain", 3.0, count=5)),
    ),
    "values": (
        None,
        SteeringPlan("m", values=Values((("good", 1.0),), TOP_K)),
        SteeringPlan("m", values=Values((("good", 2.0),), TOP_K - 2, "zero")),
    ),
}
PLANS["all of these"] = tuple(
    {id(plan): plan for plans in PLANS.values() for plan in plans}.values()
)


VALUED = ("values", "all of these")
"""Of these; requests with values verify no drafts."""


@cache
def pretended() -> str:
    """The name of a device that does not exist."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    return "pretended"


class Refused(AssertionError):
    """An operation that makes the host wait, or mixes devices."""


class Recorder(TorchDispatchMode):
    """Counts what reaches a device: operations, kernels, copies."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in given if t.dim()}
        if name.startswith(WAITS) and self.device in devices | {t.device.type for t in given}:
            raise Refused(f"{name} waits for the device")
        if len(devices) > 1:
            raise Refused(f"{name} mixes tensors on {sorted(devices)}")
        indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        if any(t is not None and t.dtype == torch.bool for t in indices):
            raise Refused(f"{name} by a mask waits for the device")
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if self.device in devices and any(t.device.type != self.device for t in made):
            raise Refused(f"{name} copies to the host, and waits")
        if not func.is_view and not name.startswith(("aten.empty", "prim.")):
            self.counts["operations"] += any(t.device.type == self.device for t in given + made)
        return result

    def to_device(
        self, arrays: Sequence[npt.NDArray[Any]], device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """In place of `staging.to_device`."""
        assert device.type == self.device
        self.counts["copies to the device"] += 1
        dtypes = [torch.from_numpy(a[:0].copy()).dtype for a in arrays]
        return tuple(
            torch.empty(a.shape, dtype=dtype, device=self.device)
            for a, dtype in zip(arrays, dtypes, strict=True)
        )

    def host_copy(self, tensor: torch.Tensor) -> mock.Mock:
        """In place of `staging.HostCopy`: it never arrives."""
        self.counts["copies to the host"] += 1
        return mock.Mock(ready=False)

    def unembedding(self, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """An unembedding of `width` ids."""

        def unembed(hidden: torch.Tensor) -> torch.Tensor:
            self.counts["unembeddings"] += 1
            return torch.empty(len(hidden), width, dtype=hidden.dtype, device=hidden.device)

        return unembed

    def kernel(self, name: str) -> Any:
        """In place of a Triton kernel."""

        def launch(*args: Any, **options: Any) -> None:
            self.counts["kernels"] += 1

        kernel = mock.MagicMock()
        kernel.__getitem__.return_value = launch
        return kernel


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Stands in for all that would need a real device."""
    from steering.kernels import triton_mix  # not every machine has Triton

    with ExitStack() as stack:
        for module in (ends_module, staging_module):
            stack.enter_context(mock.patch.object(module, "to_device", recorder.to_device))
        for module in (reporter_module, watch_module):
            stack.enter_context(mock.patch.object(module, "HostCopy", recorder.host_copy))
        for name in KERNELS:
            stack.enter_context(mock.patch.object(triton_mix, name, recorder.kernel(name)))
        yield


def step_of(
    plans: Sequence[SteeringPlan | None], report: Report = "off", drafts: int = 0
) -> StepPlan:
    """A decode step of requests with these plans; the steered ones report."""
    states = []
    for i, plan in enumerate(plans):
        payload = None
        if plan is not None:
            tag = "" if report == "off" else f"tag{i}"
            heads = ("critic",) if report != "off" else ()
            reported = replace(plan, report=report, heads=heads, bodies=("chat",) if heads else ())
            payload = SteeringPayload(reported, 0, tag, 0)
        states.append(request_state(payload, 9, NAMES, ("critic",), (7,)))
    count = len(states)
    lengths = np.full(count, 1 + drafts, np.int32)
    schedule = Schedule(
        [str(q) for q in range(count)],
        np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        np.full(count, 9, np.int32),
        np.ones(count, np.bool_),
        lengths - 1,
    )
    return plan_step(schedule, BatchTables.of(states))


def scoring_of(kind: type[Readout], recorder: Recorder, device: str) -> Scoring:
    """A read-out of streams of which one lacks ids, with padding, a head and a value stream."""

    def ids(*of: int) -> torch.Tensor:
        return torch.empty(len(of), dtype=torch.int64, device=device)

    layout = Layout((HIDDEN,) * len(NAMES), torch.bfloat16, TOP_K)
    lacking, shared = Vocabulary(ids(1, 2, 3), lacking=True), Vocabulary(ids(1))
    reading = Reading(1, lambda hidden: hidden.float().sum(-1))
    watch = Watch((*NAMES, "critic"))
    readout = kind(
        layout,
        [*(recorder.unembedding(SIZE - 16 * (i == 2)) for i in range(3)), None],
        [Vocabulary(), shared, lacking, Vocabulary()],
        ids(1),
        (reading,),
        EndSets((3,), SIZE),
        watch,
    )
    return Scoring(readout, Reporter(NAMES, layout, {"critic": reading}, watch))


def run(scoring: Scoring, recorder: Recorder, plan: StepPlan) -> None:
    """One step behind its streams' passes: values, read-out, reports, a prompt's scores."""
    readout, layout = scoring.readout, scoring.readout.layout
    tokens, rows = plan.schedule.tokens, int((plan.schedule.drafts + 1).sum())
    width = layout.width if plan.tables.steered else HIDDEN
    hidden = torch.empty(tokens, width, dtype=layout.dtype, device=recorder.device)
    staging, valued = Staging(), list[torch.Tensor]()
    scoring.begin(plan, staging)
    if plan.tables.steered:
        control = np.repeat(plan.tables.control, plan.schedule.lengths, axis=0)
        staging.add([control], lambda there: layout.write_control(hidden, there[0]))
    if plan.valued:
        of = [one.row for one in plan.valued]
        last = plan.schedule.starts[1:][of].astype(np.int64)
        count = len(plan.tables.values)
        values = STREAMS.plan(plan.valued, plan.schedule, plan.tables.offsets, count)
        staging.add([last, plan.tables.ends_of(of), *values.arrays], valued.extend)
    staging.send(hidden.device)
    if plan.valued:
        _add_values(scoring, recorder, values, hidden, *valued)
    z = scoring(torch.empty(rows, width, dtype=layout.dtype, device=recorder.device))
    assert z is not None and z.shape == (rows, SIZE)
    count = len(plan.schedule.drafts)
    readout.watch.left(z[:count].amax(-1) == -math.inf)
    readout.watch.send()
    ids = torch.empty(count, 1 + DRAFTS, dtype=torch.int64, device=recorder.device)
    scoring.reporter.sampled(ids)
    scoring(hidden[:1])  # of a prompt


STREAMS = ValueStreams({3: lambda h: h.float().sum(-1)}, {"good": 3}, {3: None}, 8, SIZE)


def _add_values(
    scoring: Scoring,
    recorder: Recorder,
    plan: ValuePlan,
    hidden: torch.Tensor,
    last: torch.Tensor,
    which: torch.Tensor,
    *staged: torch.Tensor,
) -> None:
    """As `Step._add_values`."""
    readout, layout = scoring.readout, scoring.readout.layout

    def after(_stream: int, tokens: torch.Tensor, _batch: Candidates) -> torch.Tensor:
        return torch.empty(len(tokens), HIDDEN, device=recorder.device)

    base = readout._unembed(0, hidden[last, :HIDDEN])
    assert base is not None
    scores = candidates_of(base, readout.padded)
    add = STREAMS.add(
        plan,
        staged,
        None,
        scores,
        lambda stream: hidden[last, layout.columns(stream)],
        after,
        readout.ends.of(which),
        readout.watch.requests,
    )
    layout.write_additions(hidden, last, add.ids, add.added)


def counted(
    kind: type[Readout], plans: Sequence[SteeringPlan | None], report: Report, drafts: int
) -> Counter[str]:
    """What a step does on a device, its fourth time: what is kept between steps is there.

    Raises:
        Refused: the host would wait, or devices are mixed.
    """
    device = pretended()
    recorder = Recorder(device)
    plan = step_of(plans, report, drafts)
    with recording(recorder), FakeTensorMode(), recorder:
        scoring = scoring_of(kind, recorder, device)
        for _ in range(2):
            recorder.counts.clear()
            run(scoring, recorder, plan)
    return recorder.counts


CASES: tuple[tuple[Report, int], ...] = (
    ("off", 0),
    ("summary", 0),
    ("tokens", 0),
    ("tokens", DRAFTS),
)
COLUMNS = ("unembeddings", "kernels", "operations", "copies to the device", "copies to the host")


def page() -> str:
    """The table of all classes of batches."""
    lines = [
        "# The read-out in operations",
        "",
        "This page counts the device operations of a decode step's read-out on a GPU, after the",
        "streams' passes: values, scores, reports, the watch for NaN, and the scores of one",
        "prompt's tokens. Fake tensors count them, without a GPU; `python -m",
        "tests.steering.worker.step_operations` makes this page, and a test compares it.",
        "*Kernels* are our Triton kernels, *operations* all other torch operations on the device.",
        "The host waits in no class of batch.",
        "",
        "| batch | reports | drafts | " + " | ".join(COLUMNS) + " | waits |",
        "|---|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for name, plans in PLANS.items():
        for report, drafts in CASES:
            if (report != "off" and not any(plans)) or (drafts and name in VALUED):
                continue
            counts = counted(TritonReadout, plans, report, drafts)
            numbers = " | ".join(str(counts[column]) for column in COLUMNS)
            lines.append(f"| {name} | {report} | {drafts} | {numbers} | 0 |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
