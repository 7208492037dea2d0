"""A steered engine on V2 with asynchronous scheduling: the runner is a step behind its tokens."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulated.plain import runner
from tests.emulated.platform import scheduling
from tests.engine.driver import BLOCK, STREAMS, Case, Engine, logprobs, tokens
from tests.engine.test_exactness import SPECS, TOLERANCE, assert_exact, mixed_cases, prompt
from tests.models import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

BLOCKS = 28
"""KV blocks: fewer than the requests below want."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The streams of the engine suite, in less memory than its requests want."""
    with scheduling(asynchronous=True):
        found = Engine(
            tmp_path_factory.mktemp("models"),
            ("llama", VOCAB_SIZE),
            STREAMS,
            async_scheduling=True,
            num_gpu_blocks_override=BLOCKS,
        )
        yield found
        del found
        gc.collect()


def test_the_engine_is_asynchronous_on_v2(engine: Engine) -> None:
    core: Any = engine.llm.llm_engine.engine_core.engine_core
    assert core.batch_queue_size == 2
    assert core.scheduler.vllm_config.scheduler_config.async_scheduling
    assert "vllm.v1.worker.gpu.model_runner" in {
        c.__module__ for c in type(runner(engine.llm)).__mro__
    }


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_mixed_batches_with_joins_and_leaves(engine: Engine, own: bool) -> None:
    cases = mixed_cases(21 + own, 22, own)
    assert_exact(engine, cases, engine.run(cases))


def test_preempted_requests_resume_with_the_same_answers(engine: Engine) -> None:
    rng = random.Random(1)
    guidance = {"method": "guidance", "negative": "twin", "strength": 1.2}
    cases = [
        Case(prompt(rng, 70, 110), spec, own, max_tokens=BLOCK + 8, report="summary")
        for spec, own in (
            (SPECS[1], {"plain": prompt(rng, 130, 130)}),
            (SPECS[5], {}),
            (None, {}),
            (guidance, {"twin": prompt(rng, 20, 20)}),
        )
        for _ in range(2)
    ]
    before = engine.preemptions()
    outputs = engine.run(cases)
    assert engine.preemptions() > before
    assert_exact(engine, cases, outputs)


def test_reports_agree_with_the_reference(engine: Engine) -> None:
    cases = [c for c in mixed_cases(25, 22, own=True) if c.report != "off"][:8]
    outputs = engine.run(cases)
    for case, output, tag in zip(cases, outputs, engine.tags, strict=True):
        steps = engine.reference(case)
        report = engine.report(tag, output)["0"]
        assert report["tokens"] == len(steps)
        assert report["kl_sum"] == pytest.approx(sum(s.kl for s in steps), abs=1e-3)
        assert report["changed"] == sum(s.changed for s in steps)
        if case.report == "tokens":
            assert [d["token_id"] for d in report["detail"]] == [s.token for s in steps]
            for got, want in zip(report["detail"], steps, strict=True):
                assert got["steered_logprob"] == pytest.approx(want.logprob, abs=TOLERANCE)


def test_several_choices_each_with_a_report(engine: Engine) -> None:
    rng = random.Random(11)
    params = {"n": 3, "temperature": 1.0, "seed": 5}
    own = {"chat": prompt(rng, 70, 70)}
    case = Case(prompt(rng, 40, 40), SPECS[1], own, max_tokens=6, params=params, report="tokens")
    output = engine.run([case])[0]
    report = engine.report(engine.tags[0], output)
    for i in range(3):
        drawn = iter(tokens(output, i))
        steps = engine.reference(case, choose=lambda _, drawn=drawn: next(drawn))
        want = [s.logprob for s in steps]
        assert logprobs(output, i) == pytest.approx(want, abs=TOLERANCE)
        assert [d["token_id"] for d in report[str(i)]["detail"]] == tokens(output, i)


def test_texts_end_where_they_should(engine: Engine) -> None:
    """The step after an end is scheduled already, and its token is thrown away."""
    rng = random.Random(31)
    case = Case(prompt(rng, 30, 30), SPECS[1], max_tokens=12)
    whole = tokens(engine.run([case])[0])
    at = next(i for i, token in enumerate(whole) if i >= 3 and token not in whole[:i])
    params = {"stop_token_ids": [whole[at]]}
    others = [Case(prompt(rng, 20, 20), SPECS[2], max_tokens=14) for _ in range(3)]
    ended, *rest = engine.run([Case(case.prompt, SPECS[1], max_tokens=12, params=params), *others])
    assert tokens(ended) == whole[: at + 1]
    assert_exact(engine, others, rest)
