"""Seats: random joins, leaves and reorderings replayed against a plain mirror."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.plan import Rule, RuleKind, SteeringPlan, Values
from steering.wire import Freight, pack, unpack
from steering.worker.ends import EndSets
from steering.worker.layout import ENDS, EXTRA, REQUEST, RULE_KIND, RULE_PARAM, RULE_STREAM
from steering.worker.seats import SeatBook, seat, tables

STREAMS = ("base", "chat", "plain")


def freight(rng: random.Random) -> Freight | None:
    if rng.random() < 0.3:
        return None
    weights = ((("base", 1.0), ("plain", rng.random())), (("base", 0.5), ("chat", 1.0)))
    summed = weights[rng.random() < 0.2]
    own = (("plain", tuple(range(rng.randint(1, 5)))),) if rng.random() < 0.5 else ()
    return Freight(SteeringPlan("mix", summed, prompts=own), pad=rng.choice([0, 2]))


def test_freight_travels_whole() -> None:
    plan = SteeringPlan(
        "m", (("base", 0.1), ("chat", -2.5)), Rule(RuleKind.NUCLEUS, "chat", 0.9), report="tokens"
    )
    sent = Freight(plan, 3, "tag")
    assert unpack(pack(sent)) == sent
    assert unpack(None) is None
    assert unpack({"other": 1}) is None


def test_a_plain_request_sits_on_the_base() -> None:
    found = seat(None, 5, STREAMS)
    assert found.control.tolist() == [1] + [0] * (len(STREAMS) - 1 + EXTRA)
    assert found.uses.tolist() == [True, False, False]
    assert not found.offsets.any()


def test_offsets_count_from_the_longest_prompt() -> None:
    plan = SteeringPlan(
        "m",
        (("base", 1.0), ("chat", 1.0), ("plain", -1.0)),
        prompts=(("chat", (7, 8, 9)), ("plain", (1,))),
    )
    found = seat(Freight(plan, pad=4), 10, STREAMS)
    assert found.offsets.tolist() == [4, 7, 9]
    chat = found.prompts[1]
    assert chat is not None
    assert chat.tolist() == [7, 8, 9]


def test_the_rule_is_seated() -> None:
    plan = SteeringPlan("m", (("base", 1.0), ("chat", 1.0)), Rule(RuleKind.NUCLEUS, "chat", 0.9))
    control = seat(Freight(plan), 3, STREAMS).control
    size = len(STREAMS)
    assert control[size + RULE_KIND] == RuleKind.NUCLEUS
    assert control[size + RULE_STREAM] == 1
    assert control[size + RULE_PARAM] == np.float32(0.9)


@pytest.mark.parametrize("seed", range(10))
def test_tables_follow_the_batch(seed: int) -> None:
    rng = random.Random(seed)
    book = SeatBook(STREAMS)
    requests: dict[str, tuple[Freight | None, int, tuple[int, ...]]] = {}
    batch: list[str] = []
    for step in range(60):
        if rng.random() < 0.4:
            requests[f"r{step}"] = (freight(rng), rng.randint(5, 9), ())
            batch.append(f"r{step}")
        if batch and rng.random() < 0.3:
            batch.remove(rng.choice(batch))
        if rng.random() < 0.2:
            rng.shuffle(batch)
        if not batch:
            continue
        found = book.update(list(batch), requests.__getitem__)
        want = [seat(*requests[i][:2], STREAMS) for i in batch]
        numbered = np.stack([s.control for s in want])
        numbered[:, len(STREAMS) + REQUEST] = np.arange(len(batch)) + 1
        assert np.array_equal(found.control, numbered)
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
            assert found.whole[i] == (plain and not own)
            like = found.like[i]
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
        assert found.even == (even and sums != {(0,)})
        steered = any(requests[i][0] is not None for i in batch)
        assert found.steered == steered


def test_an_unchanged_batch_is_not_read_again() -> None:
    book = SeatBook(STREAMS)
    first = book.update(["a"], lambda _: (None, 3, ()))

    def unreachable(_: str) -> tuple[Freight | None, int, tuple[int, ...]]:
        raise AssertionError("read again")

    assert book.update(["a"], unreachable) is first
    assert book.update(["b", "a"], lambda _: (None, 3, ())) is not first


def test_streams_at_other_offsets_are_not_alike_and_a_sum_without_the_base_is_not_even() -> None:
    plan = SteeringPlan("m", (("chat", 1.0), ("plain", -1.0)))
    one = seat(Freight(plan), 5, STREAMS)
    found = tables([one, one], len(STREAMS))
    assert found.like == (0, 1, 1)
    assert not found.even
    apart = replace(one, offsets=np.array([0, 0, 2], np.int32))
    assert tables([one, apart], len(STREAMS)).like == (0, 1, 2)


def test_requests_whose_rule_asks_have_their_own_stop_ids() -> None:
    sum_ = (("base", 1.0), ("chat", 1.0))
    critical = SteeringPlan("m", sum_, Rule(RuleKind.CRITICAL, "chat", 0.5, "critic"))
    valued = SteeringPlan("m", sum_, values=Values((("plain", 1.0),), 5))
    sets = EndSets([2, 3], 100)
    requests = {
        "critical": (Freight(critical), 5, [9, 3, 7, 400]),
        "valued": (Freight(valued), 5, [7, 9]),
        "other": (Freight(valued), 5, [2]),
        "summed": (Freight(SteeringPlan("m", sum_)), 5, [11]),
        "plain": (None, 5, [12]),
    }
    found = SeatBook(STREAMS, ("critic",), sets.own).update([*requests], requests.__getitem__)
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
