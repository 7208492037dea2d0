"""Steps that draft and verify, from graphs: with adapters, own prompts and values beside them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from steering import broken
from steering.engine_args import Speculation, adapter_engine_args
from steering.worker.step.graph_inputs import PIECES
from tests.adapters.make import make_lora
from tests.emulated.platform import like_cuda
from tests.emulated.steered import check, engine_in, mix, step_of
from tests.engine.driver import Case, Engine, Use, tokens
from tests.engine.heads import valued
from tests.engine.test_heads import assert_exact
from tests.engine.test_speculation import accepted
from tests.models import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

DRAFTS = 2
VALUED = {"method": "value_augmented", "values": [{"stream": "value", "strength": 2.0}], "top_k": 4}
CASES = (
    Case(range(10, 18), mix(chat=1.5, twin=-0.5), max_tokens=5),
    Case(range(10, 16), max_tokens=3),
    Case(
        range(50, 59),
        mix(chat=1.0),
        {"chat": range(100, 106)},
        adapters=(Use("one"), Use("chat", stream="chat")),
        max_tokens=5,
    ),
    Case(range(7, 12), mix(chat=4.0), max_tokens=5, arrives=1),
)
"""All but the second draft; the last one's drafts are accepted more often than not."""


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("drafting")
    with like_cuda("NONE", (32,)):
        found = engine_in(
            folder,
            {"chat": ("qwen2", VOCAB_SIZE), "twin": "base"},
            heads=lambda folder, _: {"value": valued(folder / "value", "qwen2", 21)},
            speculation=Speculation("chat", DRAFTS),
            **adapter_engine_args(3, 24),
        )
        base, chat = found.folders["base"], found.folders["chat"]
        found.load_adapters({"one": make_lora(folder / "one", base, seed=1)})
        found.load_adapters({"chat": make_lora(folder / "lora-chat", chat, seed=3)}, "chat")
        yield found
        del found
        gc.collect()


def test_every_stream_is_replayed_over_drafts(drafting: Engine) -> None:
    step = step_of(drafting)
    assert {shape.width for shape in step.graphs._streams[0].graphs} == {PIECES, 1, 1 + DRAFTS}
    offered, kept = accepted(drafting)
    passes = dict(step.counters.passes)
    check(drafting, CASES, drafting.run(CASES))
    eager = [
        step.counters.passes[name] - passes[name] - step.graphs.replays[i]
        for i, name in enumerate(step.names[:3])
    ]
    assert eager == [0, 0, 0]  # prompts too, and rows that verify drafts beside them
    assert all(step.graphs.replays[i] >= 2 for i in range(3))
    now_offered, now_kept = accepted(drafting)
    assert now_offered > offered and now_kept > kept


def test_values_beside_drafts(drafting: Engine) -> None:
    """Requests with values verify none, though the runner offers drafts for every request."""
    step = step_of(drafting)
    value = step.names.index("value")
    cases = [Case(range(20, 25), VALUED, max_tokens=3), CASES[0]]
    before = step.graphs.replays[value]
    outputs = drafting.run(cases)
    assert step.graphs.replays[value] > before
    assert_exact(drafting, cases, outputs)


def test_constraints_that_leave_nothing_are_found_among_drafts(drafting: Engine) -> None:
    nothing = {"allowed_token_ids": [40], "min_tokens": 1, "stop_token_ids": [40]}
    cases = [Case(range(7, 12), mix(chat=4.0), max_tokens=4, params=nothing), CASES[1]]
    ended, other = drafting.run(cases)
    assert (ended.outputs[0].finish_reason, tokens(ended)) == ("error", [])
    assert ended.outputs[0].stop_reason == broken.NOTHING_LEFT
    check(drafting, cases[1:], [other])
