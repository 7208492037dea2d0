"""Phases: what a request may write, what it resolves to, and which tokens have which."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from steering.errors import BadValue
from steering.method import Limits, Snapshot
from steering.phases import begun, holding, opener_of, with_ids
from steering.plan import Phase, Rule, RuleKind, Span, SteeringPlan, Text
from steering.plugins import discover
from steering.resolve import resolve
from steering.wire import SteeringPayload, pack, unpack
from steering.worker.plan.batches import Schedule
from steering.worker.plan.layout import EXTRA
from steering.worker.plan.phases import PhasedStep, Replies
from steering.worker.plan.request_state import BatchTables, request_state
from steering.worker.plan.step_plan import Classes

METHODS = discover()
SNAPSHOT = Snapshot({"base": "lm", "chat": "lm", "plain": "lm", "value": "value"})
PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0}
ONES = (("base", 1.0), ("chat", 1.0), ("plain", -1.0))
ALONE = (("base", 1.0),)


def plan_of(*phases: dict[str, Any], **fields: Any) -> SteeringPlan:
    spec = {**PROXY, **fields, "phases": phases}
    return resolve(spec, methods=METHODS, snapshot=SNAPSHOT, limits=Limits()).plan


def test_a_phase_is_the_method_with_other_values() -> None:
    plan = plan_of({"first": 100, "strength": 0}, {"after": "</think>", "strength": 0.5})
    assert plan.weights == ONES
    assert plan.phases == (
        Phase(Span(stop=100), ALONE),
        Phase(
            Span(after=Text("</think>")), (("base", 1.0), ("chat", 0.5), ("plain", -0.5))
        ),
    )  # fmt: skip
    assert plan.streams == ("chat", "plain")


def test_streams_of_any_phase_run_in_all() -> None:
    plan = plan_of({"from": 2, "strength": 1.0}, strength=0)
    assert (plan.weights, plan.streams, plan.steers) == (ALONE, ("chat", "plain"), True)
    same = plan_of({"first": 3, "strength": 1.0})
    assert (same.phases, same) == ((), plan_of())


def test_off_is_the_base_alone() -> None:
    assert plan_of({"until": "x", "off": True}).phases == (Phase(Span(until=Text("x")), ALONE),)


@pytest.mark.parametrize(
    ("phase", "field"),
    [
        ({"strength": 1}, "phases.0"),
        ({"first": 0, "strength": 1}, "phases.0.first"),
        ({"first": "3", "strength": 1}, "phases.0.first"),
        ({"from": -1}, "phases.0.from"),
        ({"after": "", "off": True}, "phases.0.after"),
        ({"first": 3, "off": True, "strength": 1}, "phases.0"),
        ({"first": 3, "strength": 11}, "phases.0.strength"),
        ({"first": 3, "stregnth": 1}, "phases.0.stregnth"),
        ({"first": 3, "prompts": {}}, "phases.0.prompts"),
        ({"first": 3, "phases": []}, "phases.0.phases"),
        ({"first": 3, "expert": "nobody"}, "phases.0.expert"),
    ],
)
def test_a_fault_names_its_field(phase: dict[str, Any], field: str) -> None:
    from steering.errors import SteeringError

    with pytest.raises(SteeringError) as caught:
        plan_of(phase)
    assert caught.value.field == f"steering.{field}"


def test_methods_of_replies_and_values_have_no_phases() -> None:
    for spec in (
        {"method": "best_of_n", "value": "value"},
        {"method": "value_augmented", "values": [{"stream": "value"}]},
    ):
        with pytest.raises(BadValue, match="phases"):
            resolve(
                {**spec, "phases": [{"first": 2, "off": True}]},
                methods=METHODS, snapshot=SNAPSHOT, limits=Limits(),
            )  # fmt: skip


def test_what_closes_a_block() -> None:
    assert [opener_of(t) for t in ("</think>", "[/THINK]", "<|/a|>", "final", "a/b")] == [
        "<think>", "[THINK]", "<|a|>", None, None,
    ]  # fmt: skip


OPEN, CLOSE = 1, 2


def encode(text: str) -> list[int]:
    return [{"<think>": OPEN, "</think>": CLOSE}[text]]


@pytest.mark.parametrize(
    ("prompt", "closed"),
    [
        ([7, 8], False),
        ([7, OPEN], False),
        ([7, OPEN, 8, CLOSE], True),
        ([OPEN, CLOSE, 7, OPEN], False),
        ([7, CLOSE], False),
    ],
)
def test_a_prompt_may_have_closed_a_block(prompt: list[int], closed: bool) -> None:
    plan = with_ids(plan_of({"after": "</think>", "off": True}), encode, "steering")
    (phase,) = begun(plan, prompt).phases
    assert (phase.span.after is None) == closed
    plan = with_ids(plan_of({"until": "</think>", "off": True}), encode, "steering")
    assert (begun(plan, prompt).phases == ()) == closed


def test_a_text_of_many_tokens_is_refused() -> None:
    plan = plan_of({"after": "long", "off": True})
    with pytest.raises(BadValue, match="too many tokens") as caught:
        with_ids(plan, lambda _: range(17), "steering")
    assert caught.value.field == "steering.phases.0.after"


def test_phases_travel() -> None:
    plan = with_ids(plan_of({"after": "</think>", "off": True}, {"from": 3}), encode, "steering")
    payload = unpack(pack(SteeringPayload(plan)))
    assert payload is not None and payload.plan == plan


# --- in the worker --------------------------------------------------------------------------------

NAMES = ("base", "chat", "plain")


def random_plan(rng: random.Random) -> SteeringPlan | None:
    if rng.random() < 0.2:
        return None
    phases = []
    for weight in range(rng.randint(0, 3)):
        texts = [Text("t", tuple(rng.choices((1, 2, 3), k=rng.randint(1, 2)))) for _ in range(2)]
        span = Span(
            rng.choice([0, 0, 2, 5]),
            rng.choice([None, None, 4, 9]),
            rng.choice([None, texts[0]]),
            rng.choice([None, texts[1]]),
        )
        phases.append(Phase(span, (("base", 1.0), ("chat", 2.0 + weight))))
    return SteeringPlan("m", (("base", 1.0), ("chat", 1.0)), phases=tuple(phases))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_each_token_has_the_control_of_its_phase(seed: int, on_device: bool) -> None:
    """Prompts in chunks, decoding, drafts; the table of a device has anything behind the newest."""
    rng = random.Random(seed)
    plans = [random_plan(rng) for _ in range(5)]
    prompts = [rng.randint(1, 8) for _ in plans]
    texts = [rng.choices((1, 2, 3, 4), k=p + rng.randint(1, 14)) for p in prompts]
    states = [
        request_state(None if plan is None else SteeringPayload(plan), length, NAMES)
        for plan, length in zip(plans, prompts, strict=True)
    ]
    tables = BatchTables.of(states)
    computed = np.array([rng.randrange(len(ids)) for ids in texts], np.int32)
    lengths = np.array(
        [rng.randint(1, len(ids) - c) for ids, c in zip(texts, computed, strict=True)], np.int32
    )
    starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    none = np.zeros(5, np.int32)
    schedule = Schedule([*"abcde"], starts, computed, none == 0, none, exact=rng.random() < 0.5)
    inputs = [i for ids, c, n in zip(texts, computed, lengths, strict=True) for i in ids[c : c + n]]
    places = [p for c, n in zip(computed, lengths, strict=True) for p in range(c, c + n)]
    if tables.phases is None:
        assert not any(plan.phases for plan in plans if plan)
        return
    watched = tables.phases.watched
    if on_device:
        table = torch.tensor([rng.choices((1, 2, 3), k=40) for _ in range(9)], dtype=torch.int32)
        slots = np.array(rng.sample(range(9), 5))
        for q, ids in enumerate(texts):
            table[slots[q], : computed[q]] = torch.tensor(ids[: computed[q]], dtype=torch.int32)
        replies: Any = Replies(table, slots[watched])
    else:
        replies = [np.array(texts[q][: computed[q] + lengths[q]], np.int32) for q in watched]
    step = PhasedStep(tables.phases, schedule, replies if watched.size else None)
    there = [torch.from_numpy(a) for a in step.arrays()]
    found = step.control(there, torch.tensor(inputs), torch.tensor(places))
    assert found.shape == (len(inputs), len(NAMES) + EXTRA)
    possible = {tuple(line) for line in tables.phases.possible(schedule).tolist()}
    row = 0
    for q, plan in enumerate(plans):
        for place in range(computed[q], computed[q] + lengths[q]):
            reply, want = texts[q][prompts[q] : place + 1], 0.0
            if plan is not None:
                phase = holding(plan, reply) if place + 1 >= prompts[q] else None
                want = dict(plan.weights if phase is None else phase.weights)["chat"]
            assert float(found[row, 1]) == want, (q, place)
            if place + 1 >= prompts[q]:
                assert tuple(found[row].tolist()) in possible
            row += 1


def test_a_phase_that_is_over_is_in_no_class() -> None:
    rule = Rule(RuleKind.SELECT, "chat", 3.0, count=5)
    plan = SteeringPlan("m", ALONE, phases=(Phase(Span(stop=2), ONES, rule),))
    tables = BatchTables.of([request_state(SteeringPayload(plan), 9, NAMES)])
    active = (True,) * 3

    def classes(computed: int, exact: bool = True) -> Classes:
        one = np.ones(1, np.int32)
        schedule = Schedule(["a"], np.array([0, 1], np.int32), computed * one, one > 0, 0 * one,
                            exact)  # fmt: skip
        return Classes.of(active, tables, schedule)

    assert [classes(c).shared for c in (8, 9, 10, 11)] == [True, True, False, False]
    assert classes(10, exact=False).shared
    assert not classes(10).has_rules
