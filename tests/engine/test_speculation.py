"""A stream that drafts: replies stay the steered model's own, token by token or in distribution."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steering.engine_args import Speculation, StreamSource
from steering.method import Logits
from tests.engine import slow
from tests.engine.driver import BLOCK, ON_V2, Case, Engine, logprobs, tokens
from tests.engine.test_exactness import SPECS, TOLERANCE, assert_exact, mixed_cases, prompt
from tests.engine.test_phases import assert_thought, phased, preempting, text_in, thinking
from tests.models import VOCAB_SIZE, make_tokenizer

pytestmark = pytest.mark.engine

DRAFTS = 4

CLOSE: dict[str, Any] = {"method": "mix", "weights": {"base": 0.35, "chat": 1.0}}
"""Near to the draft stream: some drafts are accepted, some are not."""

SAME: dict[str, Any] = {"method": "mix", "weights": {"base": 0.0, "chat": 1.0}}
"""The draft stream alone: every draft is accepted."""

BLOCKS = 40
"""KV blocks: fewer than the requests below want."""


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Four drafts a step; a full batch of them is more than a step takes (96 tokens)."""
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE + 12),
        {
            "chat": ("qwen2", VOCAB_SIZE),
            "third": ("qwen3", VOCAB_SIZE),
            "plain": ("gpt2", VOCAB_SIZE),
            "opt": ("opt", VOCAB_SIZE),
            "short": ("llama", VOCAB_SIZE - 10),
            "twin": "base",
        },
        speculation=Speculation("chat", DRAFTS),
        taps={
            "early": StreamSource(on="base", layer=1, norm=True),
            "raw": StreamSource(on="base", layer=1, norm=False),
            "chat-early": StreamSource(on="chat", layer=2, norm=True),
        },
        num_gpu_blocks_override=BLOCKS,
        reasoning_config={"reasoning_start_str": "[", "reasoning_end_str": "</think>"},
    )
    yield found
    del found
    gc.collect()


def test_taps_read_every_draft(drafting: Engine) -> None:
    rng = random.Random(60)
    before, _ = accepted(drafting)
    specs: list[dict[str, Any]] = [
        {"method": "mix", "weights": {"base": 0.4, "chat": 1.0, "early": 0.2}},
        {"method": "mix", "weights": {"base": 0.4, "chat": 0.6, "chat-early": 0.4}},
        {"method": "dola", "layers": ["early", "raw"]},
        {"method": "sled", "layers": ["early", "raw"]},
    ]
    cases = [Case(prompt(rng, 1, 60), spec, max_tokens=12) for spec in specs * 2]
    assert_exact(drafting, cases, drafting.run(cases))
    assert accepted(drafting)[0] > before


def accepted(engine: Engine) -> tuple[int, int]:
    """(drafts, accepted ones) since start, by vLLM's own series."""
    found = {metric.name: metric for metric in engine.llm.get_metrics()}
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    drafts, kept = (int(getattr(found[name], "value")) for name in names)  # noqa: B009
    return drafts, kept


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_mixed_batches_with_joins_and_leaves(drafting: Engine, own: bool) -> None:
    rng = random.Random(30 + own)
    cases = mixed_cases(20 + own, 22, own)
    for spec in (CLOSE, SAME, CLOSE):
        prompts = {"chat": prompt(rng, 1, 120)} if own else {}
        case = Case(prompt(rng, 5, 60), spec, prompts, 20, rng.randrange(8), report="tokens")
        cases.append(case)
    before = accepted(drafting)
    outputs = drafting.run(cases)
    assert accepted(drafting)[1] > before[1]
    assert_exact(drafting, cases, outputs)


def test_reports_count_drawn_tokens_only(drafting: Engine) -> None:
    rng = random.Random(31)
    specs = (CLOSE, SAME, SPECS[1], SPECS[2], None)
    cases = [Case(prompt(rng, 9, 40), s, max_tokens=19, report="tokens") for s in specs]
    outputs = drafting.run(cases)
    assert_exact(drafting, cases, outputs)
    reports = []
    for case, output, tag in zip(cases, outputs, drafting.tags, strict=True):
        steps = drafting.reference(case)
        report = drafting.report(tag, output)["0"]
        reports.append(report)
        assert report["tokens"] == len(steps)
        assert report["kl_sum"] == pytest.approx(sum(s.kl for s in steps), abs=1e-3)
        assert report["changed"] == sum(s.changed for s in steps)
        assert [d["token_id"] for d in report["detail"]] == [s.token for s in steps]
        for got, want in zip(report["detail"], steps, strict=True):
            assert got["steered_logprob"] == pytest.approx(want.logprob, abs=TOLERANCE)
            assert got["base_logprob"] == pytest.approx(want.base_logprob, abs=TOLERANCE)
        # A step draws one token more than it accepts, but the last: it may have drawn too many.
        passes = report["passes"]["base"]
        assert passes + report["accepted"] - len(steps) in (0, 1)
    close, same, *_ = reports
    # The prompt gives a token, and each of four steps five.
    assert same["passes"]["base"] == 5
    assert (same["drafted"], same["accepted"]) == (16, 15)
    assert 0 < close["accepted"] < close["drafted"]
    for undrafted in reports[3:]:
        assert undrafted["drafted"] == undrafted["accepted"] == 0
        assert undrafted["passes"]["base"] == 19


def test_preempted_requests_resume_with_the_same_answers(drafting: Engine) -> None:
    rng = random.Random(32)
    owns: list[dict[str, list[int]]] = [{}, {"chat": prompt(rng, 60, 60)}]
    cases = [
        Case(
            prompt(rng, 70, 110),
            (CLOSE, SAME, SPECS[1], None)[i % 4],
            owns[i % 2] if i % 4 != 3 else {},
            max_tokens=2 * BLOCK,
            report="summary" if i % 4 != 3 else "off",
        )
        for i in range(14)
    ]
    before = drafting.preemptions()
    outputs = drafting.run(cases)
    assert drafting.preemptions() > before
    assert_exact(drafting, cases, outputs)
    for case, output, tag in zip(cases, outputs, drafting.tags, strict=True):
        if case.spec is not None:
            assert drafting.report(tag, output)["0"]["tokens"] == case.max_tokens


def test_prefix_cache_hits_and_chunked_prompts(drafting: Engine) -> None:
    rng = random.Random(33)
    shared = prompt(rng, 150, 150)
    cases = [
        Case(shared, CLOSE, max_tokens=30),
        Case(shared, CLOSE, {"chat": prompt(rng, 70, 70)}, max_tokens=30),
        Case([*shared, 9], None, max_tokens=30),
    ]
    cold = drafting.run(cases, salt="hits")
    warm = drafting.run(cases, salt="hits")
    assert all(output.num_cached_tokens >= BLOCK for output in warm)
    assert_exact(drafting, cases, cold)
    assert_exact(drafting, cases, warm)
    # The blocks that drafts were written into hold the right tokens afterwards.
    turn = Case([*shared, *tokens(cold[0]), 17], CLOSE, max_tokens=9)
    output = drafting.run([turn], salt="hits")[0]
    assert output.num_cached_tokens >= len(shared)
    assert_exact(drafting, [turn], [output])


def test_replies_up_to_the_end_of_the_context(drafting: Engine) -> None:
    rng = random.Random(34)
    room = 512 - 490
    cases = [Case(prompt(rng, 490, 490), SAME, max_tokens=room), Case(prompt(rng, 5, 5), SAME)]
    before = accepted(drafting)
    assert_exact(drafting, cases, drafting.run(cases))
    assert accepted(drafting)[1] - before[1] > 12


def test_phases(drafting: Engine) -> None:
    """A phase may begin and end among the drafts of a step; a stream of one phase only drafts."""
    rng = random.Random(61)
    late = {"method": "mix", "weights": {"base": 1.0},
            "phases": [{"from": 2, "first": 9, "weights": CLOSE["weights"]}]}  # fmt: skip
    ends = {**SAME, "phases": [{"from": 4, "off": True}, {"first": 1, "weights": {"plain": 1.0}}]}
    ids = prompt(rng, 20, 20)
    texted = {**CLOSE, "phases": [{"after": text_in(drafting, Case(ids, CLOSE, max_tokens=12), 3),
                                   "off": True}]}  # fmt: skip
    cases = [Case(ids, texted, max_tokens=12, report="summary")]
    cases += [Case(prompt(rng, 5, 60), spec, max_tokens=15, report="summary", arrives=2)
              for spec in (late, ends, {"method": "safe_decoding", "expert": "chat"})]  # fmt: skip
    cases += phased(drafting, 62)
    with preempting(drafting, 4, 8, 12):
        outputs = drafting.run(cases)
    assert slow.assert_exact(drafting, cases, outputs) > 15
    reports = [drafting.report(t, o)["0"] for t, o in zip(drafting.tags[:4], outputs, strict=False)]
    assert all(report["drafted"] > 0 for report in reports)
    assert reports[2]["accepted"] > 0


def test_a_thinking_budget_ends_a_phase_among_drafts(drafting: Engine) -> None:
    rng = random.Random(63)
    spec = {**CLOSE, "phases": [{"after": "</think>", "weights": SAME["weights"]}]}
    asked = [(thinking(rng, spec, budget), budget) for budget in (1, 4, 6)]
    before = accepted(drafting)[0]
    for (case, budget), output in zip(asked, drafting.run([c for c, _ in asked]), strict=True):
        assert_thought(drafting, case, output, budget)
    assert accepted(drafting)[0] > before


Transform = Callable[[Logits, Sequence[int]], Logits]
"""([V] steered log-probabilities, the reply so far) → what is softmaxed."""


def exact(engine: Engine, case: Case, transform: Transform) -> dict[tuple[int, ...], float]:
    """The probability of each reply that has more than 1e-5."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(case.max_tokens):
        longer: dict[tuple[int, ...], float] = {}
        for reply, weight in found.items():
            drawn = iter([*reply, 7])  # the last one is not looked at
            one = Case(case.prompt, case.spec, case.own, len(reply) + 1)
            step = engine.reference(one, choose=lambda _, d=drawn: next(d), keep_logprobs=True)[-1]
            assert step.logprobs is not None
            scores = transform(step.logprobs, reply)
            chances = np.exp(scores - np.logaddexp.reduce(scores))
            for token in np.flatnonzero(weight * chances > 1e-5):
                longer[*reply, int(token)] = float(weight * chances[token])
        found = longer
    return found


def top_k(scores: Logits, k: int) -> Logits:
    """−∞ beyond the k best."""
    return np.where(scores >= np.sort(scores)[-k], scores, -np.inf)


DIGITS = {i for t, i in make_tokenizer().get_vocab().items() if t.isdigit() and t.isascii()}


def only_digits(scores: Logits, _: Sequence[int]) -> Logits:
    """What the grammar below leaves."""
    allowed = np.full_like(scores, -np.inf)
    allowed[list(DIGITS)] = scores[list(DIGITS)]
    return allowed


def penalised(scores: Logits, reply: Sequence[int]) -> Logits:
    """With a presence penalty of 2, then temperature 1 and top-k 4."""
    seen = np.zeros_like(scores)
    seen[list(set(reply))] = 2.0
    return top_k(scores - seen, 4)


@pytest.mark.parametrize(
    ("spec", "params", "transform"),
    [
        pytest.param(
            CLOSE,
            {"temperature": 0.7, "top_k": 4},
            lambda s, _: top_k(s / 0.7, 4),
            id="close",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            SPECS[1], {"temperature": 1.0, "top_k": 5}, lambda s, _: top_k(s, 5), id="far"
        ),
        pytest.param(
            CLOSE,
            {"temperature": 1.0, "top_k": 4, "presence_penalty": 2.0},
            penalised,
            id="penalties",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            CLOSE,
            {"temperature": 1.0, "structured_outputs": "[0-9]{1000}"},
            only_digits,
            id="grammar",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_draws_follow_the_exact_distribution(
    drafting: Engine, spec: dict[str, Any], params: dict[str, Any], transform: Transform
) -> None:
    """Chi-square over whole replies at an error rate of 1 in 10,000."""
    from vllm.sampling_params import StructuredOutputsParams

    rng = random.Random(35)
    if "structured_outputs" in params:
        ruled = StructuredOutputsParams(regex=params["structured_outputs"])
        params = {**params, "structured_outputs": ruled}
    length = 2 if transform is only_digits else 3
    case = Case(prompt(rng, 12, 12), spec, {"chat": prompt(rng, 30, 30)}, max_tokens=length)
    want = exact(drafting, case, transform)
    before, drawn = accepted(drafting), Counter[tuple[int, ...]]()
    each = 100 if ON_V2 else 500  # V2 is interpreted here
    for seed in range(4):
        several = {**params, "n": each, "seed": 1000 * seed}
        once = Case(case.prompt, spec, case.own, max_tokens=length, params=several)
        output = drafting.run([once])[0]
        drawn.update(tuple(tokens(output, i)) for i in range(each))
    drafts, kept = (a - b for a, b in zip(accepted(drafting), before, strict=True))
    assert 0 < kept < drafts
    total = sum(drawn.values())
    common = [reply for reply, chance in want.items() if chance * total >= 5]
    seen = [drawn[reply] for reply in common]
    hoped = [want[reply] * total for reply in common]
    seen.append(total - sum(seen))
    hoped.append(total - sum(hoped))
    if hoped[-1] < 5:
        seen[-2:], hoped[-2:] = [sum(seen[-2:])], [sum(hoped[-2:])]
    assert len(seen) > 10
    assert stats.chisquare(seen, hoped).pvalue > 1e-4


def test_a_seed_gives_the_same_reply_again(drafting: Engine) -> None:
    rng = random.Random(36)
    params = {"temperature": 1.0, "seed": 11}
    case = Case(prompt(rng, 250, 250), CLOSE, max_tokens=20, params=params)
    others = [Case(prompt(rng, 5, 5), CLOSE, max_tokens=20, params=params) for _ in range(3)]
    first = drafting.run([case], salt="first")[0]
    again = drafting.run([*others, case], salt="again")[-1]
    assert tokens(first) == tokens(again)
    drawn = iter(tokens(first))
    steps = drafting.reference(case, choose=lambda _: next(drawn))
    assert logprobs(first) == pytest.approx([s.logprob for s in steps], abs=TOLERANCE)


def test_penalties_act_on_the_steered_scores(drafting: Engine) -> None:
    rng = random.Random(37)
    params = {"frequency_penalty": 1.5, "presence_penalty": 0.7}
    case = Case(prompt(rng, 10, 10), CLOSE, max_tokens=24, params=params)
    counts = np.zeros(VOCAB_SIZE + 12)

    def penalise(found: Logits) -> int:
        token = int((found - 1.5 * counts - 0.7 * (counts > 0)).argmax())
        counts[token] += 1
        return token

    want = [s.token for s in drafting.reference(case, choose=penalise)]
    assert tokens(drafting.run([case])[0]) == want


def test_constraints_hold_where_they_forbid_what_is_plausible_and_what_is_drafted(
    drafting: Engine,
) -> None:
    rng = random.Random(50)
    spec = {"method": "contrastive", "amateur": "chat", "plausibility": 1.0}
    allowed = sorted(rng.sample(range(10, VOCAB_SIZE), 3))
    params = {"allowed_token_ids": allowed}
    cases = [Case(prompt(rng, 5, 40), spec, max_tokens=9, params=params) for _ in range(3)]
    before = accepted(drafting)
    for case, output in zip(cases, drafting.run(cases), strict=True):
        steps = drafting.reference(case, choose=lambda z: allowed[int(z[allowed].argmax())])
        assert tokens(output) == [s.token for s in steps]
    assert accepted(drafting)[0] > before[0]
