"""A request's adapters: what is refused, what enters the plan, what the engine gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.formats.artefact import Artefact, Gate, Part, Place
from steering.adapters import ResolvedAdapter, adapt
from steering.errors import BadValue, NotFound, SteeringError
from steering.plan import AdapterUse, SteeringPlan

PART = Part(Place("file", "a"), Place("file", "b"), 0, 4, 2.0)
LORA = Artefact(Path("/lora"), "lora", ("adapter",), ({"q": PART},), {}, ("file",))
PACK = Artefact(
    Path("/pack"),
    "meteora",
    ("x", "y", "z"),
    ({"q": PART},) * 3,
    {"q": Gate("gates", "q")},
    ("file", "gates"),
    top_k=2,
    temperature=15.0,
)
OWNERS = {"base": "base", "chat": "chat", "twin": "base"}
PLAN = SteeringPlan("base")


def test_adapters_enter_the_plan_sorted_and_the_set_by_owner() -> None:
    chosen = [
        ResolvedAdapter(PACK, "p", top_k=1),
        ResolvedAdapter(LORA, "l", "twin", 0.5),
        ResolvedAdapter(LORA, "l", "chat", -1),
        ResolvedAdapter(LORA, "l"),
    ]
    plan, found = adapt(PLAN, chosen, OWNERS)
    assert plan.adapters == (
        AdapterUse("l", "base"),
        AdapterUse("p", "base", 1.0, 1, 15.0),
        AdapterUse("l", "chat", -1.0),
        AdapterUse("l", "twin", 0.5),
    )
    assert found is not None
    # The twin runs the base's layers: the same member serves both.
    assert [(m.owner, m.digest) for m in found.members] == [
        ("base", "l"),
        ("base", "p"),
        ("chat", "l"),
    ]
    assert found.rank == 4 + 3 * 4 + 3
    assert adapt(PLAN, chosen[::-1], OWNERS) == (plan, found)


def test_no_adapter_and_a_weight_of_zero_are_the_base() -> None:
    assert adapt(PLAN, [], OWNERS) == (PLAN, None)
    assert adapt(PLAN, [ResolvedAdapter(LORA, "l", weight=0.0)], OWNERS) == (PLAN, None)


def test_one_set_serves_all_weights() -> None:
    def found(*weights: float) -> object:
        one, two = (
            ResolvedAdapter(LORA, name, weight=w) for name, w in zip("ab", weights, strict=True)
        )
        return adapt(PLAN, [one, two], OWNERS)[1]

    assert found(1.0, 0.5) == found(-2.0, 3.0) == found(0.0, 1.0)


def test_sets_differ_by_content_and_owner() -> None:
    sets = [
        adapt(PLAN, chosen, OWNERS)[1]
        for chosen in (
            [ResolvedAdapter(LORA, "a")],
            [ResolvedAdapter(LORA, "b")],
            [ResolvedAdapter(LORA, "a", "chat")],
            [ResolvedAdapter(LORA, "a"), ResolvedAdapter(LORA, "b")],
        )
    ]
    requests = [s.lora_request() for s in sets if s]
    assert len({r["lora_int_id"] for r in requests}) == len({r["lora_name"] for r in requests}) == 4
    assert all(0 < int(r["lora_int_id"]) < 1 << 62 for r in requests)


def test_prefix_caches_are_told_apart_by_adapters_and_numbers() -> None:
    chosen = [
        [],
        [ResolvedAdapter(LORA, "a")],
        [ResolvedAdapter(LORA, "a", weight=0.5)],
        [ResolvedAdapter(LORA, "b")],
        [ResolvedAdapter(LORA, "a", "chat")],
        [ResolvedAdapter(PACK, "a")],
        [ResolvedAdapter(PACK, "a", top_k=1)],
        [ResolvedAdapter(PACK, "a", temperature=1.0)],
    ]
    keys = [adapt(PLAN, c, OWNERS)[0].cache_key(0) for c in chosen]
    assert keys[0] == ""
    assert len(set(keys)) == len(keys)


NAN = float("nan")


@pytest.mark.parametrize(
    ("chosen", "error", "field"),
    [
        ([ResolvedAdapter(LORA, "l", "other", field="adapters.0")], NotFound, "adapters.0.stream"),
        ([ResolvedAdapter(LORA, "l", weight=10.5)], BadValue, "adapters.weight"),
        ([ResolvedAdapter(LORA, "l", weight=NAN)], BadValue, "adapters.weight"),
        ([ResolvedAdapter(LORA, "l", top_k=2)], BadValue, "adapters.top_k"),
        ([ResolvedAdapter(LORA, "l", temperature=2.0)], BadValue, "adapters.temperature"),
        ([ResolvedAdapter(PACK, "p", top_k=0)], BadValue, "adapters.top_k"),
        ([ResolvedAdapter(PACK, "p", top_k=4)], BadValue, "adapters.top_k"),
        ([ResolvedAdapter(PACK, "p", temperature=0.0)], BadValue, "adapters.temperature"),
        ([ResolvedAdapter(PACK, "p", temperature=NAN)], BadValue, "adapters.temperature"),
        (
            [ResolvedAdapter(LORA, "l"), ResolvedAdapter(LORA, "l", weight=2.0)],
            BadValue,
            "adapters",
        ),
    ],
)
def test_refused(chosen: list[ResolvedAdapter], error: type[SteeringError], field: str) -> None:
    with pytest.raises(error) as caught:
        adapt(PLAN, chosen, OWNERS)
    assert caught.value.field == field


def test_too_much_rank_together_is_refused() -> None:
    chosen = [ResolvedAdapter(LORA, str(i), field=f"adapters.{i}") for i in range(3)]
    adapt(PLAN, chosen, OWNERS, max_rank=12)
    with pytest.raises(BadValue, match=r"got 12.*≤ 11"):
        adapt(PLAN, chosen, OWNERS, max_rank=11)
    # Adapters of different models lie side by side.
    chosen[2] = replace(chosen[2], stream="chat")
    adapt(PLAN, chosen, OWNERS, max_rank=8)
