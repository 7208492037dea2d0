"""Batches of whatever methods a request may name, as `tests/specs.py` makes them, in one engine.

Requests join at different steps, prompts come in chunks and from the prefix cache, and some are
preempted; every token is held against the slow definition.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering.engine_args import StreamSource
from steering.plan import SteeringPlan
from tests.engine.driver import BLOCK, METHODS, Case, Engine
from tests.engine.heads import Headed, classifier, probe, valued
from tests.engine.slow import assert_exact
from tests.engine.test_exactness import prompt
from tests.engine.test_phases import preempting
from tests.models import VOCAB_SIZE
from tests.specs import WITHOUT_PHASES, Spec, Streams, kinds, specs
from tests.tiers import nightly

pytestmark = pytest.mark.engine

STREAMS = Streams(
    ("chat", "plain", "short", "twin"),
    ("value", "kind"),
    ("critic", "probe"),
    ("early", "raw"),
    strength=(0.0, 2.0),
    weight=(-1.5, 1.5),
)
BATCHES = 5 if nightly() else 1


class AnyEngine(Engine):
    """Gets what the front end makes of methods that draw several replies, or blocks of one."""

    def plan(self, case: Case) -> SteeringPlan | None:
        """Of one reply, or of one block."""
        found = super().plan(case)
        if found is None or found.search is None:
            return found if found is None else found.drawing
        return found.proposing(found.search.draw)


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    return {
        "critic": classifier(folder / "critic", "llama", 11, tokens=True, labels=2),
        "probe": probe(folder / "probe", bodies["base"], "base", 15),
        "value": valued(folder / "value", "qwen2", 21),
        "kind": valued(folder / "kind", "llama", 22, port=True),
    }


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Everything that a method may ask for; the base has rows that are no token."""
    found = AnyEngine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE + 12),
        {
            "chat": ("qwen2", VOCAB_SIZE),
            "plain": ("gpt2", VOCAB_SIZE),
            "short": ("llama", VOCAB_SIZE - 10),
            "twin": "base",
        },
        make_heads,
        taps={
            "early": StreamSource(on="base", layer=1, norm=True),
            "raw": StreamSource(on="base", layer=1, norm=False),
        },
        num_gpu_blocks_override=2 * 60,  # half of them are for candidates
    )
    yield found
    del found
    gc.collect()


def case_of(spec: Spec, rng: random.Random, shared: list[int]) -> Case:
    spec = {name: value for name, value in spec.items() if name not in ("prompts", "report")}
    named = [name for name in ("chat", "twin", "value") if f"'{name}'" in str(spec)]
    if rng.random() < 0.3:
        ids, own = [*shared, *prompt(rng, 0, 9)], {}
    else:
        ids = prompt(rng, 1, 3 * BLOCK)
        own = {name: prompt(rng, 1, 100) for name in named if rng.random() < 0.4}
    length = rng.randint(3, 8) if "value" in str(spec) else rng.randint(3, 14)
    return Case(ids, spec, own, length, rng.randrange(12))


def batches() -> list[tuple[Spec, ...]]:
    """Each with every kind of spec, without phases and with them."""
    phased = [kind for kind in kinds(STREAMS) if kind not in WITHOUT_PHASES]
    every = [*((kind, False) for kind in kinds(STREAMS)), *((kind, True) for kind in phased)]
    found: list[tuple[Spec, ...]] = []

    @settings(max_examples=BATCHES + 1, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.tuples(*(specs(STREAMS, kind, phases) for kind, phases in every)))
    def collect(asked: tuple[Spec, ...]) -> None:
        found.append(asked)

    collect()
    assert all({spec["method"] for spec in asked} == {*METHODS} for asked in found)
    return found[1:]  # the first one is the simplest: strengths of 0


def test_any_batch_is_exact(everything: Engine) -> None:
    """One request of each kind without phases, and one with them, each time."""
    rng = random.Random(1)
    for number, asked in enumerate(batches()):
        shared = prompt(rng, 2 * BLOCK + 5, 2 * BLOCK + 5)
        cases = [case_of(spec, rng, shared) for spec in asked]
        cases += [Case(shared, max_tokens=20), Case(prompt(rng, 90, 120), max_tokens=60)]
        with preempting(everything, 4, 9, 15):
            outputs = everything.run(cases, salt=str(number))
        assert_exact(everything, cases, outputs)
        again = [case for case in cases if case.prompt[: len(shared)] == shared]
        warm = everything.run(again, salt=str(number))
        assert_exact(everything, again, warm)
        assert any(output.num_cached_tokens >= BLOCK for output in warm)
