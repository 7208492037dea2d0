"""The engine against plain `transformers`: every token equal, log-probabilities within 1e-4."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from steering.worker.readout.readout import Readout
from tests.engine.driver import BLOCK, ERRORS, Case, Engine, logprobs, tokens
from tests.models import SPECIAL, VOCAB_SIZE

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
"""Nats, float32: the only tolerance of these tests."""

SPECS: list[dict[str, Any] | None] = [
    None,
    {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0},
    {"method": "proxy_tuning", "expert": "third", "anti_expert": "opt", "strength": 0.4},
    {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.0},
    {"method": "emulated_fine_tuning", "tuned": "chat", "reference": "third", "strength": 1.5},
    {
        "method": "emulated_fine_tuning",
        "tuned": "plain",
        "reference": "opt",
        "strength": 0.7,
        "delta_top_p": 0.8,
    },
    {
        "method": "emulated_fine_tuning",
        "rewards": [{"tuned": "chat", "weight": 0.7}, {"tuned": "plain", "weight": 0.2}],
        "reference": "third",
    },
    {"method": "contrastive", "amateur": "plain", "strength": 0.5, "plausibility": 0.1},
    {"method": "mix", "weights": {"base": 0.5, "opt": 0.6, "chat": -0.3}},
    {"method": "mix", "weights": {"base": 0.0, "third": 1.0}},
    {"method": "mix", "weights": {"base": 0.6, "short": 0.7}},
]


def prompt(rng: random.Random, low: int, high: int) -> list[int]:
    """Random regular tokens."""
    return [rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(rng.randint(low, high))]


def mixed_cases(seed: int, count: int, own: bool) -> list[Case]:
    """Cases of all methods, of many lengths, joining and leaving at different steps."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        spec = SPECS[i % len(SPECS)]
        prompts = {}
        if own and spec is not None:
            used = [s for s in ("chat", "third", "plain", "opt") if s in str(spec)]
            prompts = {s: prompt(rng, 1, 150) for s in used if rng.random() < 0.6}
        cases.append(
            Case(
                prompt(rng, 1, 90),
                spec,
                prompts,
                max_tokens=rng.randint(4, 14),
                arrives=rng.randrange(12),
                report=rng.choice(["off", "summary", "tokens"]) if spec else "off",
            )
        )
    return cases


def assert_exact(engine: Engine, cases: Sequence[Case], outputs: Sequence[Any]) -> None:
    """Every token and log-probability as in the reference."""
    for case, output in zip(cases, outputs, strict=True):
        steps = engine.reference(case)
        assert tokens(output) == [s.token for s in steps], case
        want = [s.logprob for s in steps]
        assert logprobs(output) == pytest.approx(want, abs=TOLERANCE), case
        ERRORS.extend(abs(a - b) for a, b in zip(logprobs(output), want, strict=True))


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_mixed_batches_with_joins_and_leaves(engine: Engine, own: bool) -> None:
    cases = mixed_cases(1 + own, 22, own)
    outputs = engine.run(cases)
    assert_exact(engine, cases, outputs)


def test_reports_agree_with_the_reference(engine: Engine) -> None:
    cases = [c for c in mixed_cases(5, 22, own=True) if c.report != "off"]
    outputs = engine.run(cases)
    assert len(cases) > 5
    for case, output, tag in zip(cases, outputs, engine.tags, strict=True):
        steps = engine.reference(case)
        report = engine.report(tag, output)["0"]
        assert report["tokens"] == len(steps)
        assert report["kl_sum"] == pytest.approx(sum(s.kl for s in steps), abs=1e-3)
        assert report["changed"] == sum(s.changed for s in steps)
        assert report["passes"] == {name: len(steps) for name in engine.streams(case)}
        detail = report["detail"]
        if case.report == "summary":
            assert detail == []
            continue
        assert [d["token_id"] for d in detail] == [s.token for s in steps]
        for got, want in zip(detail, steps, strict=True):
            assert got["steered_logprob"] == pytest.approx(want.logprob, abs=TOLERANCE)
            assert got["base_logprob"] == pytest.approx(want.base_logprob, abs=TOLERANCE)
            assert got["kl"] == pytest.approx(want.kl, abs=1e-3)
            assert got["changed"] == want.changed


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_block_boundaries(engine: Engine, length: int) -> None:
    rng = random.Random(length)
    spec = SPECS[1]
    cases = [
        Case(prompt(rng, length, length), spec, own, max_tokens=BLOCK + 3)
        for own in (
            {},
            {"chat": prompt(rng, BLOCK, BLOCK)},
            {"chat": prompt(rng, 1, 1), "plain": prompt(rng, 2 * BLOCK + 1, 2 * BLOCK + 1)},
        )
    ]
    assert_exact(engine, cases, engine.run(cases))


def test_a_twin_reads_another_prompt_with_the_base_weights(engine: Engine) -> None:
    rng = random.Random(8)
    context_aware = {"method": "context_aware", "without": "twin", "strength": 0.5}
    guidance = {"method": "guidance", "negative": "twin", "strength": 1.5}
    cases = [
        Case(prompt(rng, 60, 80), spec, {"twin": prompt(rng, low, low + 30)})
        for spec in (context_aware, guidance)
        for low in (1, 100)
    ]
    cases.append(Case(prompt(rng, 40, 40), guidance))  # the same prompt: nothing to guide away
    assert_exact(engine, cases, engine.run(cases))


def test_prefix_cache_hits_give_the_same_answers(engine: Engine) -> None:
    rng = random.Random(9)
    shared = prompt(rng, 100, 100)
    own = {"chat": prompt(rng, 70, 70)}
    cases = [
        Case(shared, None),
        Case(shared, SPECS[1]),
        Case(shared, {**(SPECS[1] or {}), "strength": 0.3}),
        Case(shared, SPECS[1], own),
        Case(shared, SPECS[1], {"chat": prompt(rng, 130, 130)}),
    ]
    cold = [engine.run([case], salt="hits")[0] for case in cases]
    warm = [engine.run([case], salt="hits")[0] for case in cases]
    # The second case is the first to run these streams; the third differs in strength only.
    assert [o.num_cached_tokens > 0 for o in cold] == [False, False, True, False, False]
    assert all(o.num_cached_tokens >= 2 * BLOCK for o in warm)
    assert_exact(engine, cases, cold)
    assert_exact(engine, cases, warm)


def test_a_longer_prompt_reuses_the_answer_of_a_conversation(engine: Engine) -> None:
    rng = random.Random(10)
    first = Case(prompt(rng, 50, 50), SPECS[1], max_tokens=30)
    answer = engine.run([first])[0]
    turn = Case([*first.prompt, *tokens(answer), *prompt(rng, 9, 9)], SPECS[1])
    output = engine.run([turn])[0]
    assert output.num_cached_tokens >= 2 * BLOCK
    assert_exact(engine, [turn], [output])


def test_several_choices_share_the_prompt(engine: Engine) -> None:
    rng = random.Random(11)
    case = Case(
        prompt(rng, 40, 40),
        SPECS[1],
        {"chat": prompt(rng, 70, 70)},
        max_tokens=8,
        params={"n": 4, "temperature": 1.0, "seed": 5},
        report="tokens",
    )
    output = engine.run([case])[0]
    report = engine.report(engine.tags[0], output)
    assert len({tuple(tokens(output, i)) for i in range(4)}) > 1
    for i in range(4):
        drawn = iter(tokens(output, i))
        steps = engine.reference(case, choose=lambda _, drawn=drawn: next(drawn))
        want = [s.logprob for s in steps]
        assert logprobs(output, i) == pytest.approx(want, abs=TOLERANCE)
        got = report[str(i)]["detail"]
        assert [d["token_id"] for d in got] == tokens(output, i)
        assert [d["steered_logprob"] for d in got] == pytest.approx(want, abs=TOLERANCE)


def test_prompt_log_probabilities_are_the_steered_models(engine: Engine) -> None:
    from tests.reference import load, prompt_logprobs

    rng = random.Random(12)
    for spec in (SPECS[1], SPECS[5], SPECS[7], None):
        case = Case(prompt(rng, 120, 120), spec, params={"prompt_logprobs": 0}, max_tokens=2)
        other = Case(prompt(rng, 30, 30), SPECS[2])
        output = engine.run([case, other])[0]
        models = {n: load(engine.folders[n]) for n in engine.streams(case)}
        want = prompt_logprobs(models, case.prompt, engine.mix(case))
        for t, entry in enumerate(output.prompt_logprobs[1:]):
            token = case.prompt[t + 1]
            assert entry[token].logprob == pytest.approx(want[t, token], abs=TOLERANCE)


def test_a_rows_answer_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    cases = mixed_cases(13, 22, own=True)
    together = engine.run(cases, salt="together")
    for case, output in list(zip(cases, together, strict=True))[::3]:
        alone = engine.run([case], salt=f"alone{id(case)}")[0]
        assert tokens(alone) == tokens(output)
        assert logprobs(alone) == pytest.approx(logprobs(output), abs=1e-5)


def test_zero_strength_has_the_bits_of_the_base(engine: Engine) -> None:
    rng = random.Random(14)
    prompts = [prompt(rng, 20, 20) for _ in range(8)]

    def bits(spec: dict[str, Any] | None, neighbours: dict[str, Any] | None) -> list[Any]:
        cases = [Case(p, spec if i % 2 else neighbours) for i, p in enumerate(prompts)]
        outputs = engine.run(cases, salt=f"{spec}{neighbours}")
        return [(tokens(o), logprobs(o)) for i, o in enumerate(outputs) if i % 2]

    plain = bits(None, None)
    for spec in (
        {**(SPECS[1] or {}), "strength": 0.0},
        {"method": "contrastive", "amateur": "plain", "strength": 0.0},
        {"method": "context_aware", "without": "twin", "strength": 0.0},
    ):
        assert bits(spec, None) == plain
    # Base rows keep their bits beside steered ones.
    assert bits(None, SPECS[1]) == plain


def test_streams_run_only_the_rows_that_use_them(engine: Engine) -> None:
    rng = random.Random(15)
    before = engine.counters()
    steered = Case(prompt(rng, 10, 10), {"method": "mix", "weights": {"base": 1.0, "opt": 0.5}})
    cases = [steered, *[Case(prompt(rng, 10, 10)) for _ in range(3)]]
    engine.run(cases)
    engine.run([Case(prompt(rng, 10, 10))])
    after = engine.counters()

    def grown(what: str, name: str) -> int:
        return int(after[what][name] - before[what][name])

    tokens_run = 10 + steered.max_tokens - 1
    assert grown("tokens", "opt") == tokens_run
    assert grown("tokens", "base") == 5 * tokens_run
    assert grown("passes", "base") == 2 * steered.max_tokens
    assert grown("passes", "opt") == steered.max_tokens
    for idle in ("chat", "third", "plain", "short", "twin"):
        assert grown("passes", idle) == 0


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"},
        {"method": "guidance", "negative": "twin"},
        {"method": "mix", "weights": {"base": 1.0, "third": 0.5, "twin": -0.4}},
    ],
    ids=["side by side", "twin", "side by side with a twin"],
)
def test_one_product(engine: Engine, spec: dict[str, Any], monkeypatch: Any) -> None:
    """Requests of one method at many strengths, then others beside them: exact on both paths."""
    ways = {"one": 0, "general": 0}
    in_one, general = Readout.in_one, Readout.__call__

    def counted(self: Readout, *args: Any) -> Any:
        found = in_one(self, *args)
        ways["one"] += found is not None
        return found

    def counted_general(self: Readout, *args: Any) -> Any:
        ways["general"] += 1
        return general(self, *args)

    monkeypatch.setattr(Readout, "in_one", counted)
    monkeypatch.setattr(Readout, "__call__", counted_general)
    rng = random.Random(3)
    own = {"twin": prompt(rng, 5, 40)} if spec["method"] == "guidance" else {}
    strengths: list[dict[str, Any]] = [{}]
    if spec["method"] != "mix":
        strengths = [{"strength": s} for s in (0.3, 1.5, 2.0)]
    alike = [
        Case(prompt(rng, 1, 200), {**spec, **s}, own, max_tokens=9, arrives=i)
        for i, s in enumerate(strengths * 2)
    ]
    assert_exact(engine, alike, engine.run(alike))
    assert ways["one"] > 5
    assert not ways["general"]
    others = [*alike, Case(prompt(rng, 1, 90), None, max_tokens=6, arrives=4)]
    assert_exact(engine, others, engine.run(others))
    assert ways["general"] >= 5
