"""A load that fails, wherever it does, leaves nothing; and whoever tries again gets it all.

One slot, that another set had before: what remains of it would be somebody else's adapter.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import pytest
from vllm.lora.request import LoRARequest

from steering.engine_args import adapter_engine_args
from tests.adapters.make import ATTENTION, make_lora
from tests.engine.driver import Case, Engine, Use
from tests.engine.test_exactness import assert_exact, prompt
from tests.injected import POINTS, Injected, Point, failing, manager_of
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with one slot, and two adapters that change different layers."""
    folder = tmp_path_factory.mktemp("models")
    found = Engine(folder, ("llama", VOCAB_SIZE), {}, **adapter_engine_args(1, 16))
    base = found.folders["base"]
    found.load_adapters(
        {
            "theirs": make_lora(folder / "theirs", base, seed=1, r=8),
            "mine": make_lora(folder / "mine", base, seed=2, targets=ATTENTION),
        }
    )
    yield found
    del found
    gc.collect()


def request(engine: Engine, name: str) -> LoRARequest:
    """As the engine gets it with a request that uses one adapter."""
    _, found = engine.adapted(Case([1], adapters=(Use(name),)))
    assert found is not None
    return LoRARequest(**found.lora_request())


def answers(engine: Engine, name: str, seed: int) -> None:
    """A request gets what PEFT computes with this adapter."""
    case = Case(prompt(random.Random(seed), 20, 40), max_tokens=4, adapters=(Use(name),))
    assert_exact(engine, [case], engine.run([case]))


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("point", POINTS)
def test_who_tries_again_does_not_get_somebody_elses_adapter(
    one_slot: Engine, point: Point, after: int
) -> None:
    engine, manager = one_slot.llm.llm_engine, manager_of(one_slot.llm)
    theirs, mine = request(one_slot, "theirs"), request(one_slot, "mine")
    assert engine.add_lora(theirs)
    answers(one_slot, "theirs", 1)
    assert engine.remove_lora(theirs.lora_int_id)
    with failing(manager, point, after, Injected("here")), pytest.raises(Injected):
        engine.add_lora(mine)
    # Posted again: it says that it is loaded, and a request runs on it.
    assert engine.add_lora(mine)
    answers(one_slot, "mine", 2)
    assert engine.remove_lora(mine.lora_int_id)
