"""Phases: what a request may write, what it resolves to, and which tokens have which."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.where import Text
from steering.errors import BadValue
from steering.method import Limits, Snapshot
from steering.phases import begun, holding, opener_of, with_ids
from steering.plan import LayerKind, Phase, Rule, RuleKind, Span, SteeringPlan, Values
from steering.plugins import discover
from steering.resolve import resolve
from steering.wire import SteeringPayload, pack, unpack
from steering.worker.plan.batches import Schedule
from steering.worker.plan.layout import EXTRA
from steering.worker.plan.phases import PhasedStep, Replies
from steering.worker.plan.request_state import BatchTables, request_state
from steering.worker.plan.step_plan import Classes, plan_step

METHODS = discover()
SNAPSHOT = Snapshot(
    {"base": "lm", "chat": "lm", "plain": "lm", "value": "value", "kind": "value", "q": "q",
     "early": "lm", "late": "lm"},
    taps={"early": "base", "late": "base"},
)  # fmt: skip
PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0}
ONES = (("base", 1.0), ("chat", 1.0), ("plain", -1.0))
ALONE = (("base", 1.0),)


def plan_of(*phases: dict[str, Any], **fields: Any) -> SteeringPlan:
    return phased(PROXY | fields, *phases)


def phased(spec: dict[str, Any], *phases: dict[str, Any]) -> SteeringPlan:
    spec = {**spec, "phases": phases}
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


def test_methods_that_choose_among_replies_have_no_phases() -> None:
    for spec in (
        {"method": "best_of_n", "value": "value"},
        {"method": "guided_search", "score": {"value": "value"}},
    ):
        with pytest.raises(BadValue, match="the method takes no phases") as caught:
            phased(spec, {"first": 2, "off": True})
        assert caught.value.field == "steering.phases"


VALUE = {"method": "value_augmented", "values": [{"stream": "value", "strength": 2.0}]}


def test_values_follow_the_phase() -> None:
    one = {"stream": "kind", "strength": 0.5}
    plan = phased(VALUE, {"first": 3, "values": [one]}, {"from": 9, "off": True})
    kind = Values((("kind", 0.5),), 20)
    assert plan.values == Values((("value", 2.0),), 20)
    assert [phase.values for phase in plan.phases] == [kind, None]
    assert plan.valued == (plan.values, kind)
    assert plan.streams == ("kind", "value")
    none = {"stream": "value", "strength": 0.0}
    late = phased({**VALUE, "values": [none]}, {"from": 4, "values": [one], "top_k": 3})
    assert (late.values, late.valued) == (None, (Values((("kind", 0.5),), 3),))
    same = phased(VALUE, {"from": 4, "values": [{"stream": "value", "strength": 2.0}]})
    assert same.phases == ()


def test_the_values_of_a_phase_are_in_the_report_of_every_token() -> None:
    one = {"stream": "kind", "strength": 0.5}
    assert phased({**VALUE, "report": "tokens"}, {"first": 3, "values": [one]}).heads == (
        "kind", "value",
    )  # fmt: skip


def test_a_value_of_a_phase_is_inside_the_limits() -> None:
    with pytest.raises(BadValue, match="out of range") as caught:
        phased(VALUE, {"first": 3, "values": [{"stream": "kind", "strength": 11.0}]})
    assert caught.value.field == "steering.phases.0.values.0.strength"


def test_layers_follow_the_phase() -> None:
    dola = {"method": "dola", "layers": ["early", "late"]}
    plan = phased(dola, {"first": 2, "layers": ["late"], "jsd": True}, {"from": 5, "off": True})
    assert [rule.kind for rule in plan.layered] == [LayerKind.CONTRAST, LayerKind.CONTRAST_JSD]
    assert plan.taps == ("early", "late")
    assert plan.phases[0].weights == (("base", 1.0), ("late", -1.0))
    assert plan.phases[1] == Phase(Span(5), ALONE)
    sled = phased({"method": "sled", "layers": ["early"]}, {"after": "x", "rate": 0.5})
    assert [rule.rate for rule in sled.layered] == [2.0, 0.5]


def test_a_method_with_phases_of_its_own_has_them_inside_the_requests() -> None:
    safe = {"method": "safe_decoding", "expert": "chat", "tokens": 4}
    weights = (("base", 1.0), ("chat", 1.0))

    def phase(strength: float, **span: Any) -> Phase:
        rule = Rule(RuleKind.SELECT, "chat", strength, count=5.0)
        return Phase(Span(**span), weights, rule)

    plan = phased(safe, {"first": 2, "strength": 5.0}, {"from": 3, "strength": 0.0})
    assert plan.phases == (
        phase(3.0, stop=4), Phase(Span(stop=2), ALONE), phase(5.0, stop=2), Phase(Span(3), ALONE),
    )  # fmt: skip
    # Off but in a phase: it had been nothing at all.
    late = phased({**safe, "strength": 0.0}, {"from": 1, "strength": 2.0, "after": "x"})
    assert late.phases == (
        Phase(Span(1, None, Text("x")), ALONE), phase(2.0, start=1, stop=4, after=Text("x")),
    )  # fmt: skip
    assert late.streams == ("chat",)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_phases_or_says_that_it_has_none(method: str) -> None:
    """A phase with a strength must not be lost."""
    on: dict[str, dict[str, Any]] = {
        "proxy_tuning": PROXY,
        "emulated_fine_tuning": {"tuned": "chat", "reference": "plain"},
        "contrastive": {"amateur": "chat"},
        "mix": {"weights": {"base": 1.0, "chat": 0.5}},
        "context_aware": {"without": "chat"},
        "guidance": {"negative": "chat"},
        "value_augmented": VALUE,
        "critical_tokens": {"pretrained": "chat", "classifier": "critic"},
        "best_of_n": {"value": "value"},
        "guided_search": {"score": {"value": "value"}},
        "dola": {"layers": ["early"]},
        "sled": {"layers": ["early"]},
        "select": {"second": "chat", "gate": "constant"},
        "safe_decoding": {"expert": "chat"},
    }
    snapshot = Snapshot({**SNAPSHOT.streams, "critic": "classifier"}, taps=SNAPSHOT.taps)
    spec = {**on[method], "method": method, "phases": [{"from": 2, "off": True}]}

    def found() -> SteeringPlan:
        return resolve(spec, methods=METHODS, snapshot=snapshot, limits=Limits()).plan

    if method in ("best_of_n", "guided_search"):
        with pytest.raises(BadValue, match="the method takes no phases"):
            found()
    else:
        plan = found()
        assert plan.phases[-1] == Phase(Span(2), ALONE)
        assert plan.streams or plan.taps


def test_what_closes_a_block() -> None:
    assert [opener_of(t) for t in ("</think>", "[/THINK]", "<|/a|>", "final", "a/b")] == [
        "<think>", "[THINK]", "<|a|>", None, None,
    ]  # fmt: skip


OPEN, CLOSE = 1, 2


FIELDS = ("steering.phases.0", "steering.phases.1")


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
    plan = with_ids(plan_of({"after": "</think>", "off": True}), encode, FIELDS[:1])
    (phase,) = begun(plan, prompt).phases
    assert (phase.span.after is None) == closed
    plan = with_ids(plan_of({"until": "</think>", "off": True}), encode, FIELDS[:1])
    assert (begun(plan, prompt).phases == ()) == closed


def test_a_text_of_many_tokens_is_refused() -> None:
    """The field is the request's, however many phases the method has of its own."""
    safe = {"method": "safe_decoding", "expert": "chat",
            "phases": [{"first": 1, "strength": 1.0}, {"after": "long", "off": True}]}  # fmt: skip
    found = resolve(safe, methods=METHODS, snapshot=SNAPSHOT, limits=Limits())
    assert len(found.plan.phases) == 4
    with pytest.raises(BadValue, match="too many tokens") as caught:
        with_ids(found.plan, lambda _: range(17), found.phase_fields)
    assert caught.value.field == "steering.phases.1.after"


def test_phases_travel() -> None:
    plan = with_ids(plan_of({"after": "</think>", "off": True}, {"from": 3}), encode, FIELDS)
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
    kept = tables.may_hold(schedule)
    step = PhasedStep(tables.phases, schedule, replies if watched.size else None)
    there = [torch.from_numpy(a) for a in step.arrays()]
    found = there[0][step.line(there, torch.tensor(inputs), torch.tensor(places))]
    assert found.shape == (len(inputs), len(NAMES) + EXTRA)
    possible = {tuple(line) for line in there[0][torch.from_numpy(kept)].tolist()}
    row = 0
    for q, plan in enumerate(plans):
        for place in range(computed[q], computed[q] + lengths[q]):
            reply, want = texts[q][prompts[q] : place + 1], 0.0
            if plan is not None:
                phase = holding(plan, reply) if place + 1 >= prompts[q] else None
                want = dict(plan.weights if phase is None else phase.weights)["chat"]
            assert float(found[row, 1]) == want, (q, place)
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


def test_values_run_only_where_a_phase_with_them_may_hold() -> None:
    """The last phase that certainly holds leaves nothing to others."""
    values = Values((("value", 1.0),), 3)
    off = Phase(Span(2, 5), ALONE)
    late = Phase(Span(7), ALONE, values=replace(values, top_k=1))
    texted = Phase(Span(7, after=Text("x", (5,))), ALONE)
    names = (*NAMES, "value")

    def chosen(phases: tuple[Phase, ...], computed: int, exact: bool = True) -> list[int]:
        plan = SteeringPlan("m", ALONE, values=values, bodies=("value",), phases=phases)
        tables = BatchTables.of([request_state(None, 9, names),
                                 request_state(SteeringPayload(plan), 9, names)])  # fmt: skip
        one = np.ones(2, np.int32)
        schedule = Schedule(["a", "b"], np.arange(3, dtype=np.int32), computed * one, one > 0,
                            0 * one, exact)  # fmt: skip
        step = plan_step(schedule, tables)
        assert step.classes.valued == bool(step.valued)
        ran = ("base", "value", *["value"] * bool(step.valued))
        assert step.ran(1, names) == ran
        return [v.top_k for one in step.valued for _, v in one.lines]

    steps = range(8, 17)
    assert [chosen((off, late), c) for c in steps] == [
        [3], [3], [], [], [], [3], [3], [1], [1],
    ]  # fmt: skip
    assert [chosen((off, texted), c) for c in steps] == [
        [3], [3], [], [], [], [3], [3], [3], [3],
    ]  # fmt: skip
    assert [chosen((off, late), c, False) for c in (8, 10, 16)] == [[3], [3], [3, 1]]
