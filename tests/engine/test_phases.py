"""Phases in a real engine: strengths and rules that follow the reply's tokens."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from steering.kernels.reference import log_softmax
from steering.phases import holding
from tests.engine.driver import BLOCK, STREAMS, Case, Engine, logprobs, tokens
from tests.engine.slow import MARGIN, assert_exact, steered
from tests.engine.test_exactness import prompt
from tests.models import VOCAB_SIZE, make_tokenizer

pytestmark = pytest.mark.engine

PROXY: dict[str, Any] = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
MASKED = {"method": "contrastive", "amateur": "plain"}
SAFE = {"method": "safe_decoding", "expert": "third", "strength": 1.5, "tokens": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """That of the other tests, with a budget for thinking."""
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        STREAMS,
        reasoning_config={"reasoning_start_str": "[", "reasoning_end_str": "</think>"},
    )
    yield found
    del found
    gc.collect()


def text_in(engine: Engine, case: Case, at: int, length: int = 1) -> str:
    """A text that is `length` tokens of what the case gives, the first time at token `at`."""
    drawn = tokens(engine.run([case])[0])
    encode = make_tokenizer().encode
    for start in range(at, len(drawn) - length):
        ids = drawn[start : start + length]
        places = [i for i in range(len(drawn)) if drawn[i : i + length] == ids]
        text = make_tokenizer().decode(ids)
        if places[0] == start and encode(text, add_special_tokens=False) == ids:
            return str(text)
    pytest.skip("no such text in this reply")


def phased(engine: Engine, seed: int) -> list[Case]:
    """Cases of all kinds of bounds, beside plain ones."""
    rng = random.Random(seed)
    cases = []
    for spec in (PROXY, MASKED, {"method": "mix", "weights": {"base": 0.5, "short": 0.7}}):
        ids = prompt(rng, 5, 60)
        first = text_in(engine, Case(ids, spec, max_tokens=9), 2)
        mix = spec["method"] == "mix"
        other = {"weights": {"base": 1.0, "chat": 0.4}} if mix else {"strength": 2.0}
        for phases in (
            [{"first": 3, "off": True}],
            [{"from": 2, **other}, {"from": 5, "off": True}],
            [{"after": first, **other}],
            [{"until": first, "off": True}, {"first": 1, **other}],
        ):
            cases.append(Case(ids, {**spec, "phases": phases}, max_tokens=9,
                              arrives=rng.randrange(8)))  # fmt: skip
    cases += [Case(prompt(rng, 5, 90), spec, max_tokens=8) for spec in (None, PROXY, SAFE, MASKED)]
    own = {"chat": prompt(rng, 70, 120)}
    phases = [{"first": 4, "strength": 0.2}, {"from": 7, "off": True}]
    cases.append(Case(prompt(rng, 9, 9), {**PROXY, "phases": phases}, own, max_tokens=9))
    rng.shuffle(cases)
    return cases


def test_mixed_batches(engine: Engine) -> None:
    cases = phased(engine, 3)
    assert assert_exact(engine, cases, engine.run(cases)) > 12


def test_a_text_of_several_tokens(engine: Engine) -> None:
    ids = prompt(random.Random(4), 20, 20)
    text = text_in(engine, Case(ids, PROXY, max_tokens=10), 1, length=2)
    case = Case(ids, {**PROXY, "phases": [{"after": text, "off": True}]}, max_tokens=10)
    assert assert_exact(engine, [case], engine.run([case])) == 1


def test_a_block_that_the_prompt_has_closed(engine: Engine) -> None:
    rng = random.Random(5)
    opener, closer = (make_tokenizer().encode(t) for t in ("<think>", "</think>"))
    assert opener and closer
    spec = {**PROXY, "phases": [{"after": "</think>", "off": True}]}
    cases = [
        Case([*prompt(rng, 9, 9), *opener, *closer], spec, max_tokens=4),
        Case([*prompt(rng, 9, 9), *opener], spec, max_tokens=4),
        Case(prompt(rng, 9, 9), spec, max_tokens=4),
    ]
    assert_exact(engine, cases, engine.run(cases))


def test_off_gives_the_bases_bits(engine: Engine) -> None:
    """In a batch of the same shape: the log-probabilities are equal, not nearly so."""
    rng = random.Random(6)
    ids = prompt(rng, 30, 30)
    plain, beside = Case(ids, None, max_tokens=6), Case(ids, PROXY, max_tokens=6)
    off = Case(ids, {**PROXY, "phases": [{"from": 0, "off": True}]}, max_tokens=6)
    want, _ = engine.run([plain, beside])
    found, _ = engine.run([off, beside])
    assert tokens(found) == tokens(want)
    assert logprobs(found) == logprobs(want)


@contextmanager
def preempting(engine: Engine, *at: int) -> Iterator[None]:
    """In some steps the request that came last is preempted."""
    core: Any = engine.llm.llm_engine.engine_core.engine_core
    scheduler, step, steps = core.scheduler, core.scheduler.schedule, [0]

    def schedule(*args: Any, **options: Any) -> Any:
        steps[0] += 1
        if steps[0] in at and scheduler.running:
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
        return step(*args, **options)

    before = engine.preemptions()
    scheduler.schedule = schedule
    try:
        yield
    finally:
        del scheduler.schedule
    assert engine.preemptions() > before


def test_preempted_requests_are_in_the_phase_that_they_were_in(engine: Engine) -> None:
    rng = random.Random(7)
    cases = []
    for _ in range(2):
        ids = prompt(rng, 40, 60)
        text = text_in(engine, Case(ids, PROXY, max_tokens=12), 4)
        for phases in ([{"after": text, "off": True}], [{"first": 6, "strength": 0.1}]):
            cases.append(Case(ids, {**PROXY, "phases": phases}, max_tokens=12))
    with preempting(engine, 5, 9):
        outputs = engine.run(cases)
    assert_exact(engine, cases, outputs)


def test_prefix_hits_chunks_and_several_choices(engine: Engine) -> None:
    ids = prompt(random.Random(8), 4 * BLOCK + 3, 4 * BLOCK + 3)
    spec = {**PROXY, "phases": [{"first": 2, "strength": 0.0}, {"from": 4, "off": True}]}
    case = Case(ids, spec, max_tokens=6)
    cold, warm = (engine.run([case], salt="phases")[0] for _ in range(2))
    assert (cold.num_cached_tokens, warm.num_cached_tokens >= 3 * BLOCK) == (0, True)
    assert_exact(engine, [case, case], [cold, warm])
    several = Case(ids, spec, max_tokens=6, params={"n": 3, "temperature": 1.0, "seed": 3})
    output = engine.run([several])[0]
    for choice in range(3):
        drawn = tokens(output, choice)
        for n, found in enumerate(logprobs(output, choice)):
            want = log_softmax(steered(engine, several, drawn[:n]))[drawn[n]]
            assert found == pytest.approx(want, abs=1e-4)


def test_reports_of_phases(engine: Engine) -> None:
    ids = prompt(random.Random(9), 30, 30)
    spec = {**PROXY, "phases": [{"from": 2, "off": True}]}
    case = Case(ids, spec, max_tokens=5, report="tokens")
    output = engine.run([case])[0]
    detail = engine.report(engine.tags[0], output)["0"]["detail"]
    assert [d["kl"] > 1e-6 for d in detail] == [True, True, False, False, False]
    assert all(list(d["choices"]) == ["base"] for d in detail)


def assert_thought(engine: Engine, case: Case, output: Any, budget: int) -> None:
    """So many tokens of the first phase, the forced end, then those of the second; each has the
    log-probability that its phase gives it.
    """
    plan, drawn = engine.plan(case), tokens(output)
    end = make_tokenizer().encode("</think>", add_special_tokens=False)
    assert plan is not None and len(end) > 1
    assert drawn[budget : budget + len(end)] == end
    assert drawn.index(end[0]) == budget
    phases, behind = [holding(plan, drawn[:n]) for n in range(len(drawn))], budget + len(end)
    assert phases == [None] * behind + [plan.phases[0]] * (len(drawn) - behind)
    for n, (token, found) in enumerate(zip(drawn, logprobs(output), strict=True)):
        z = steered(engine, case, drawn[:n])
        assert found == pytest.approx(log_softmax(z)[token], abs=1e-4), n
        forced = budget <= n < budget + len(end)
        assert forced or z[token] >= z.max() - MARGIN, n


def thinking(rng: random.Random, spec: dict[str, Any], budget: int) -> Case:
    """One whose prompt has begun to think. V1 counts a begin of several tokens wrongly."""
    begin = make_tokenizer().encode("[", add_special_tokens=False)
    assert len(begin) == 1
    ids = [i for i in prompt(rng, 9, 30) if i != begin[0]]
    params = {"thinking_token_budget": budget}
    return Case([*ids, *begin], spec, max_tokens=14, params=params)


def test_a_thinking_budget_ends_the_phase_of_thinking(engine: Engine) -> None:
    """The tokens that vLLM forces are the text that a phase waits for."""
    rng = random.Random(10)
    off = [{"after": "</think>", "off": True}]
    weak = [{"after": "</think>", "strength": 0.2}]
    asked = [(thinking(rng, {**PROXY, "phases": phases}, budget), budget)
             for phases, budget in ((off, 4), (weak, 1), (off, 6))]  # fmt: skip
    beside = [Case(prompt(rng, 9, 30), PROXY, max_tokens=9), Case(prompt(rng, 9, 30), None)]
    outputs = engine.run([*(case for case, _ in asked), *beside])
    for (case, budget), output in zip(asked, outputs, strict=False):
        assert_thought(engine, case, output, budget)
    assert_exact(engine, beside, outputs[len(asked) :])
