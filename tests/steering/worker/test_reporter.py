"""Reports of steps, from hidden states and drawn tokens to what the front end fetches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from steering.kernels.reference import log_softmax, measure_reference
from steering.plan import BASE, AdapterUse, Ender, Gate, Rule, RuleKind, SteeringPlan
from steering.wire import SteeringPayload
from steering.worker.adapting.groups import Routed
from steering.worker.plan.batches import Schedule
from steering.worker.plan.layout import Layout
from steering.worker.plan.request_state import BatchTables, request_state
from steering.worker.plan.staging import HostCopy, Staging
from steering.worker.plan.step_plan import plan_step
from steering.worker.readout.parts import Reading, Vocabulary
from steering.worker.readout.readout import Readout
from steering.worker.readout.report import KEPT, ReportBook
from steering.worker.readout.reporter import Reporter
from steering.worker.readout.scoring import Scoring
from steering.worker.readout.watch import Watch

SIZE, HIDDEN = 40, 8
NAMES = (BASE, "chat", "plain")
LACKING = torch.tensor([3, 36])

SUM = SteeringPlan("m", ((BASE, 1.0), ("chat", 0.5), ("plain", -0.5)), report="tokens")
CRITICAL = SteeringPlan(
    "m",
    ((BASE, 1.0), ("chat", 1.0)),
    Rule(
        RuleKind.SELECT,
        "chat",
        0.5,
        "critic",
        gate=Gate.HEAD,
        hard=True,
        ender=Ender.SUM,
        best=True,
    ),
    report="summary",
    heads=("critic",),
    bodies=("plain",),
)


class World:
    """A read-out, and steps of requests with these plans."""

    def __init__(self, *plans: SteeringPlan | None) -> None:
        rng = torch.Generator().manual_seed(5)
        self.tables = [torch.randn(SIZE, HIDDEN, generator=rng) for _ in NAMES]
        self.probe = torch.randn(HIDDEN, generator=rng)
        self.layout = Layout((HIDDEN,) * len(NAMES), torch.float32)
        reading = Reading(2, lambda h: h @ self.probe)
        self.watch = Watch((*NAMES, "critic"))
        lacking = Vocabulary(LACKING, lacking=True)
        readout = Readout(
            self.layout,
            [partial(torch.nn.functional.linear, weight=table) for table in self.tables],
            [Vocabulary(), lacking, Vocabulary()],
            None,
            (reading,),
            watch=self.watch,
        )
        self.reporter = Reporter(NAMES, self.layout, {"critic": reading}, self.watch)
        self.scoring = Scoring(readout, self.reporter)
        states = []
        for i, plan in enumerate(plans):
            payload = None if plan is None else SteeringPayload(plan, 0, f"tag{i}", 0)
            states.append(request_state(payload, 9, NAMES, ("critic",)))
        self.batch = BatchTables.of(states)
        self.rng = rng

    def step(self, drafts: list[int], drawn: list[list[int]], draws: Any = True) -> torch.Tensor:
        """One step that verifies drafts and draws; its [R, V] scores."""
        counts = np.array(drafts, np.int32) + 1
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        requests = np.broadcast_to(np.array(draws), counts.shape)
        ids = [f"{q}_r" if q == 1 else str(q) for q in range(len(drafts))]
        schedule = Schedule(ids, starts, 9 * counts, requests, counts - 1)
        self.hidden = torch.randn(int(starts[-1]), self.layout.width, generator=self.rng)
        control = np.repeat(self.batch.control, counts, axis=0)
        self.layout.write_control(self.hidden, torch.from_numpy(control))
        staging = Staging()
        self.scoring.begin(plan_step(schedule, self.batch), staging)
        staging.send(torch.device("cpu"))
        z = self.scoring(self.hidden)
        assert z is not None
        kept = z.clone()
        z.zero_()  # the sampler changes scores in place
        width = max(drafts) + 1
        padded = [[*own, *[-1] * (width - len(own))] for own in drawn]
        self.reporter.sampled(torch.tensor(padded))
        return kept

    def own(self, row: int, stream: int) -> np.ndarray:
        part = self.hidden[row, self.layout.columns(stream)]
        scores = (self.tables[stream] @ part).double().numpy()
        if stream == 1:
            scores[LACKING] = -np.inf
        return scores


def test_an_entry_has_what_the_definition_says() -> None:
    world = World(None, SUM)
    z = world.step([0, 0], [[7], [11]])
    got = world.reporter.take("tag1", {"1": 1})["1"]
    (entry,) = got["detail"]
    scores, base = z[1].double().numpy(), world.own(1, 0)
    kl, choice, base_choice = measure_reference(scores, base)
    assert entry["kl"] == got["kl_sum"] == pytest.approx(kl, abs=1e-5)
    assert (entry["base_choice"], entry["changed"]) == (base_choice, choice != base_choice)
    assert entry["token_id"] == 11
    assert entry["steered_logprob"] == pytest.approx(log_softmax(scores)[11], abs=1e-5)
    assert entry["base_logprob"] == pytest.approx(log_softmax(base)[11], abs=1e-5)
    assert [*entry["choices"]] == [*NAMES]
    for i, name in enumerate(NAMES):
        own = log_softmax(world.own(1, i))
        assert entry["choices"][name] == (own.argmax(), pytest.approx(own.max(), abs=1e-5))
    assert got["passes"] == dict.fromkeys(NAMES, 1)
    assert world.reporter.take("tag1", {}) == {}, "a report is forgotten when it was fetched"


def test_rows_behind_a_rejected_draft_count_for_nothing() -> None:
    world = World(SUM, CRITICAL)
    z = world.step([2, 1], [[4, 9], [1, 2]])
    kls = [measure_reference(z[r].double().numpy(), world.own(r, 0))[0] for r in range(5)]
    world.step([2, 0], [[5, 6, 8], [3]])
    own = world.reporter.take("tag0", {"0": 5})["0"]
    assert [e["token_id"] for e in own["detail"]] == [4, 9, 5, 6, 8]
    assert [e["kl"] for e in own["detail"][:2]] == pytest.approx(kls[:2], abs=1e-5)
    assert (own["tokens"], own["drafted"], own["accepted"]) == (5, 4, 3)
    other = world.reporter.take("tag1", {"1": 3})["1"]
    assert (other["tokens"], other["drafted"], other["accepted"]) == (3, 1, 1)
    assert other["detail"] == []


@pytest.mark.parametrize(
    ("count", "accepted", "passes"), [(1, 1, 1), (2, 1, 1), (3, 2, 2), (6, 3, 3)]
)
def test_what_was_drawn_behind_the_end_is_left_out(count: int, accepted: int, passes: int) -> None:
    """Under speculation, and in steps that were scheduled before the end was known."""
    world = World(SUM)
    world.step([1], [[4, 9]])
    world.step([2], [[5, 6, 8]])
    world.reporter.book.tally("tag0", "0").draft("plain", 2)
    world.step([0], [[1]])
    got = world.reporter.take("tag0", {"0": count})["0"]
    assert got["tokens"] == len(got["detail"]) == count
    assert got["accepted"] == accepted
    assert got["passes"]["chat"] == passes
    assert got["passes"]["plain"] == passes + 2 * (passes > 1)


def test_heads_and_critical_tokens() -> None:
    world = World(None, CRITICAL, None)
    critical = 0
    for _ in range(6):
        world.step([0, 0, 0], [[1], [2], [3]])
        odds = float(world.hidden[1, world.layout.columns(2)] @ world.probe)
        critical += odds > 0
    got = world.reporter.take("tag1", {})["1"]
    assert (got["tokens"], got["critical"]) == (6, critical)
    assert 0 < critical < 6
    assert got["heads"] == {"critic": pytest.approx(odds, abs=1e-5)}


def test_a_head_without_a_number_flags_its_request() -> None:
    world = World(replace(CRITICAL, rule=Rule()), CRITICAL)
    world.probe[0] = torch.nan
    world.step([1, 0], [[1, 2], [3]])
    assert world.watch.take() == {0: 0b1000, 1: 0b1000}


def test_a_chunk_of_a_prompt_reports_nothing() -> None:
    world = World(SUM, SUM)
    world.step([0, 0], [[4], [5]], draws=[False, True])
    assert world.reporter.take("tag0", {}) == {}
    assert world.reporter.take("tag1", {})["1"]["tokens"] == 1


def test_later_calls_of_a_step_measure_nothing() -> None:
    world = World(SUM)
    world.step([0], [[4]])
    world.hidden[:] = torch.nan
    world.scoring(world.hidden)
    world.reporter.sampled(torch.tensor([[9]]))
    assert world.watch.take() == {}
    assert world.reporter.take("tag0", {})["0"]["tokens"] == 1


def test_reports_that_nobody_fetches_are_bounded() -> None:
    book = ReportBook()
    for i in range(KEPT + 3):
        book.tally(f"tag{i}", "0").begin([BASE], 0)
    assert book.take("tag2", {}) == {} != book.take("tag3", {})


def test_routes_are_taken_in_when_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for them in a step; a report that is fetched does."""

    class Late(HostCopy):
        reads = 0

        @property
        def ready(self) -> bool:
            return False

        def read(self) -> torch.Tensor:
            Late.reads += 1
            return super().read()

    monkeypatch.setattr("steering.worker.readout.reporter.HostCopy", Late)
    use = AdapterUse("pack", top_k=1)
    world = World(None, replace(SUM, adapters=(use,)), replace(SUM, adapters=(use,)))
    counts = torch.tensor([[9, 9], [3, 1], [0, 2]])
    for _ in range(2):
        other = Routed("base", "other", torch.full((3, 5), 7))
        routed = [other, Routed("base", "pack", counts.clone())]
        # A chunk of the prompt, and a step that draws.
        for draws in ([True, False, False], True):
            world.reporter.routes(["0", "1_r", "2"], world.batch, routed)
            world.step([0, 0, 0], [[7], [11] if draws is True else [], [2]], draws)
    assert Late.reads == 0
    assert world.reporter.take("tag1", {"1": 2})["1"]["routed"] == {"base": {"pack": [12, 4]}}
    assert Late.reads == 6
    # Of this one only the first token counts: the second was scheduled before the end was known.
    assert world.reporter.take("tag2", {"0": 1})["0"]["routed"] == {"base": {"pack": [0, 4]}}


READ = SteeringPlan("m", report="summary", likelihoods=(BASE, "plain", "chat"))
SUMMED = SteeringPlan("m", (("plain", 1.0),), report="summary", likelihoods=("plain",))


@pytest.mark.parametrize("beside", [(), (SUM, None)], ids=["alone", "beside others"])
def test_log_probabilities_of_drawn_tokens_add_up(beside: tuple[Any, ...]) -> None:
    """Also of streams that are in no sum, and of drafts that were accepted; −∞ where one lacks."""
    world = World(READ, SUMMED, *beside)
    drafts = [1, 0, *[0] * len(beside)]
    want = dict.fromkeys(NAMES, 0.0)
    plain = 0.0
    for drawn in ([4, 9], [5, int(LACKING[0])]):
        world.step(drafts, [drawn, [7], *[[1]] * len(beside)])
        for row, token in enumerate(drawn):
            for i, name in enumerate(NAMES):
                want[name] += log_softmax(world.own(row, i))[token]
        plain += log_softmax(world.own(2, 2))[7]
    got = world.reporter.take("tag0", {"0": 4})["0"]["likelihoods"]
    assert got.pop("chat") == want.pop("chat") == -np.inf
    assert got == pytest.approx(want, abs=1e-5)
    own = world.reporter.take("tag1", {"1": 2})["1"]["likelihoods"]
    assert own == {"plain": pytest.approx(plain, abs=1e-5)}


def test_a_log_probability_of_no_number_names_its_stream() -> None:
    world = World(READ)
    world.tables[2].fill_(np.nan)
    world.step([0], [[4]])
    assert world.watch.take() == {0: 1 << 2}
