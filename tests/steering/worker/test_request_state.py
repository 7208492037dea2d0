"""Per-request state: random joins, leaves and reorderings replayed against a plain mirror."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.plan import Gate, Rule, RuleKind, SteeringPlan, Values
from steering.wire import SteeringPayload, pack, unpack
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import ENDS, EXTRA, RULE_KIND, RULE_PARAM, RULE_STREAM
from steering.worker.plan.request_state import BatchTables, RequestStates, request_state

STREAMS = ("base", "chat", "plain")


def payload(rng: random.Random) -> SteeringPayload | None:
    if rng.random() < 0.3:
        return None
    weights = ((("base", 1.0), ("plain", rng.random())), (("base", 0.5), ("chat", 1.0)))
    summed = weights[rng.random() < 0.2]
    own = (("plain", tuple(range(rng.randint(1, 5)))),) if rng.random() < 0.5 else ()
    return SteeringPayload(SteeringPlan("mix", summed, prompts=own), pad=rng.choice([0, 2]))


def test_a_payload_arrives_as_it_was_sent() -> None:
    plan = SteeringPlan(
        "m", (("base", 0.1), ("chat", -2.5)), Rule(RuleKind.NUCLEUS, "chat", 0.9), report="tokens"
    )
    sent = SteeringPayload(plan, 3, "tag")
    assert unpack(pack(sent)) == sent
    assert unpack(None) is None
    assert unpack({"other": 1}) is None


def test_a_plain_request_runs_the_base() -> None:
    found = request_state(None, 5, STREAMS)
    assert found.control.tolist() == [1] + [0] * (len(STREAMS) - 1 + EXTRA)
    assert found.uses.tolist() == [True, False, False]
    assert not found.offsets.any()


def test_offsets_count_from_the_longest_prompt() -> None:
    plan = SteeringPlan(
        "m",
        (("base", 1.0), ("chat", 1.0), ("plain", -1.0)),
        prompts=(("chat", (7, 8, 9)), ("plain", (1,))),
    )
    found = request_state(SteeringPayload(plan, pad=4), 10, STREAMS)
    assert found.offsets.tolist() == [4, 7, 9]
    chat = found.prompts[1]
    assert chat is not None
    assert chat.tolist() == [7, 8, 9]


def test_a_tap_is_used_and_what_it_reads() -> None:
    """Else its hidden state is zero, and every id as likely as any other."""
    plan = SteeringPlan("m", (("base", 0.0), ("chat", 1.0)), taps=("chat",))
    found = request_state(SteeringPayload(plan), 3, STREAMS, taps={"chat": "plain"})
    assert {name for name, used in zip(STREAMS, found.uses, strict=True) if used} == {
        "base", "chat", "plain"}  # fmt: skip


def test_the_rule_is_in_the_control() -> None:
    plan = SteeringPlan("m", (("base", 1.0), ("chat", 1.0)), Rule(RuleKind.NUCLEUS, "chat", 0.9))
    control = request_state(SteeringPayload(plan), 3, STREAMS).control
    size = len(STREAMS)
    assert control[size + RULE_KIND] == RuleKind.NUCLEUS
    assert control[size + RULE_STREAM] == 1
    assert control[size + RULE_PARAM] == np.float32(0.9)


@pytest.mark.parametrize("seed", range(10))
def test_tables_follow_the_batch(seed: int) -> None:
    rng = random.Random(seed)
    states = RequestStates(STREAMS)
    requests: dict[str, tuple[SteeringPayload | None, int, tuple[int, ...]]] = {}
    batch: list[str] = []
    for step in range(60):
        if rng.random() < 0.4:
            requests[f"r{step}"] = (payload(rng), rng.randint(5, 9), ())
            states.add_request(f"r{step}", *requests[f"r{step}"])
            batch.append(f"r{step}")
        if batch and rng.random() < 0.3:
            gone = rng.choice(batch)
            batch.remove(gone)
            if rng.random() < 0.7:  # else it was preempted, and its state stays
                states.remove_request(gone)
        if rng.random() < 0.2:
            rng.shuffle(batch)
        if not batch:
            continue
        found = states.apply(batch)
        want = [request_state(*requests[i][:2], STREAMS) for i in batch]
        assert np.array_equal(found.control, np.stack([s.control for s in want]))
        assert np.array_equal(found.uses, np.stack([s.uses for s in want]))
        assert np.array_equal(found.offsets, np.stack([s.offsets for s in want]))
        for i in range(len(STREAMS)):
            own = {row: ids for row, one in enumerate(want) if (ids := one.prompts[i]) is not None}
            prompts = found.prompts[i]
            assert (prompts is None) == (not own)
            if prompts is not None:
                assert prompts.rows.tolist() == [*own]
                assert [ids.tolist() for ids in prompts.ids] == [o.tolist() for o in own.values()]
                assert prompts.sizes.tolist() == [ids.size for ids in prompts.ids]
            plain = all(one.uses[i] and not one.offsets[i] for one in want)
            assert found.full_batch[i] == (plain and not own)
            like = found.shares_batch_with[i]
            assert like <= i
            assert all(
                one.uses[like] == one.uses[i] and one.offsets[like] == one.offsets[i]
                for one in want
            )
            assert like == i or not own
        weights = [one.control[: len(STREAMS)] for one in want]
        running = {tuple(np.flatnonzero(w)) for w in weights}
        sums = {tuple(np.flatnonzero(one.uses)) for one in want}
        even = running == sums and len(sums) == 1 and all(w[0] for w in weights)
        assert found.uniform_sum == (even and sums != {(0,)})
        steered = any(requests[i][0] is not None for i in batch)
        assert found.steered == steered


def test_an_unchanged_batch_keeps_its_tables() -> None:
    states = RequestStates(STREAMS)
    states.add_request("a", None, 3, ())
    states.add_request("b", None, 3, ())
    first = states.apply(["a"])
    assert states.apply(["a"]) is first
    assert states.apply(["b", "a"]) is not first


def test_a_request_of_the_same_id_is_another_one() -> None:
    states = RequestStates(STREAMS)
    states.add_request("a", None, 3, ())
    states.apply(["a"])
    steered = SteeringPayload(SteeringPlan("m", (("base", 1.0), ("chat", 1.0))))
    states.add_request("a", steered, 3, ())
    assert states.apply(["a"]).uses[0].tolist() == [True, True, False]
    states.remove_request("a")
    with pytest.raises(KeyError):
        states.apply(["a"])


def test_an_earlier_reply_is_not_part_of_the_prompt() -> None:
    own = SteeringPlan("m", (("base", 1.0), ("chat", 1.0)), prompts=(("chat", (7, 8)),))
    states = RequestStates(STREAMS)
    states.add_request("a", SteeringPayload(own, reply=4), 9, ())
    assert states.apply(["a"]).offsets.tolist() == [[0, 3, 0]]


def test_streams_at_other_offsets_share_no_batch_and_a_uniform_sum_has_the_base() -> None:
    plan = SteeringPlan("m", (("chat", 1.0), ("plain", -1.0)))
    one = request_state(SteeringPayload(plan), 5, STREAMS)
    found = BatchTables.of([one, one])
    assert found.shares_batch_with == (0, 1, 1)
    assert not found.uniform_sum
    apart = replace(one, offsets=np.array([0, 0, 2], np.int32))
    assert BatchTables.of([one, apart]).shares_batch_with == (0, 1, 2)


def test_requests_whose_rule_asks_have_their_own_stop_ids() -> None:
    sum_ = (("base", 1.0), ("chat", 1.0))
    critical = SteeringPlan(
        "m", sum_, Rule(RuleKind.SELECT, "chat", 0.5, "critic", gate=Gate.HEAD, hard=True)
    )
    valued = SteeringPlan("m", sum_, values=Values((("plain", 1.0),), 5))
    sets = EndSets([2, 3], 100)
    requests = {
        "critical": (SteeringPayload(critical), 5, [9, 3, 7, 400]),
        "valued": (SteeringPayload(valued), 5, [7, 9]),
        "other": (SteeringPayload(valued), 5, [2]),
        "summed": (SteeringPayload(SteeringPlan("m", sum_)), 5, [11]),
        "plain": (None, 5, [12]),
    }
    states = RequestStates(STREAMS, ("critic",), sets.own)
    for name, request in requests.items():
        states.add_request(name, *request)
    found = states.apply([*requests])
    assert found.ends == ((), (7, 9))
    which = found.control[:, len(STREAMS) + ENDS]
    assert which.tolist() == [1, 1, 0, 0, 0]
    sets.show(found.ends)
    ends = sets.of(torch.from_numpy(which))
    assert ends is not None
    told = [row.nonzero()[:, 0].tolist() for row in ends.of(torch.arange(5), 100)]
    assert told == [[2, 3, 7, 9], [2, 3, 7, 9], [2, 3], [2, 3], [2, 3]]


def test_nothing_ends_a_text_unless_somebody_says_so() -> None:
    sets = EndSets((), 100)
    assert sets.of(torch.zeros(2)) is None
    sets.show([(), (4,)])
    ends = sets.of(torch.tensor([0.0, 1.0]))
    assert ends is not None
    assert ends.of(torch.tensor([0, 1]), 100).nonzero().tolist() == [[1, 4]]
