"""Streams with heads against slow references: every token, log-probabilities within 1e-4."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steering.method import log_softmax
from tests.engine.driver import BLOCK, ERRORS, Case, Engine, logprobs, tokens
from tests.engine.heads import Headed, classifier, deferring, probe, tuned, valued
from tests.engine.test_exactness import TOLERANCE, prompt
from tests.models import EOS, VOCAB_SIZE
from tests.reference import load, scores

pytestmark = pytest.mark.engine


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    """One of each format."""
    return {
        "critic": classifier(folder / "critic", "llama", 11, tokens=True, labels=2),
        "gpt": classifier(folder / "gpt", "gpt2", 12, tokens=True, labels=1),
        "whole": classifier(folder / "whole", "qwen2", 13, tokens=False, labels=1),
        "defer": deferring(folder / "defer", 14, VOCAB_SIZE + 12),
        "probe": probe(folder / "probe", bodies["base"], "base", 15),
        "value": valued(folder / "value", "qwen2", 21),
        "kind": valued(folder / "kind", "llama", 22, port=True),
        "lora": tuned(folder / "lora", "qwen3", 23),
        "network": probe(folder / "network", bodies["chat"], "chat", 16, hidden=24),
    }


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE + 12),
        {"chat": ("qwen2", VOCAB_SIZE), "plain": ("gpt2", VOCAB_SIZE), "twin": "base"},
        make_heads,
        num_gpu_blocks_override=56,  # half of them are for candidates
    )
    yield found
    del found
    gc.collect()


class Slow:
    """One request, decoded by the formulas: a full forward of every model for every token."""

    def __init__(self, engine: Engine, case: Case) -> None:
        self.engine, self.case, self.spec = engine, case, dict(case.spec or {})
        self.response: list[int] = []
        self.wanted: list[float] = []
        self.critical: list[float] = []

    def ids(self, stream: str) -> list[int]:
        return [*self.case.own.get(stream, self.case.prompt), *self.response]

    def log_p(self, stream: str) -> np.ndarray:
        folder = self.engine.folders[self.engine.same_as.get(stream, stream)]
        row = scores(load(folder), self.ids(stream))[-1]
        out = np.full(VOCAB_SIZE + 12, -np.inf)
        out[:VOCAB_SIZE] = row[:VOCAB_SIZE]
        return log_softmax(out)

    def head(self, name: str) -> float:
        head = self.engine.heads[name]
        return head.read(self.ids(head.on or name))

    def critical_tokens(self) -> np.ndarray:
        aligned = self.log_p(self.spec.get("aligned", "base"))
        known = self.log_p(self.spec["pretrained"])
        known[EOS] = -np.inf
        q = 1 / (1 + np.exp(-self.head(self.spec["classifier"])))
        self.critical.append(float(q))
        with np.errstate(divide="ignore"):
            if self.spec.get("mode") == "soft":
                p, k = np.exp(aligned), np.exp(log_softmax(known))
                mixed = (1 - q) * p + q * (1 - p[EOS]) * k
                mixed[EOS] = p[EOS]
                found: np.ndarray = np.log(mixed)
                return found
            if q > self.spec.get("threshold", 0.5):
                return np.log(np.eye(known.size)[known.argmax()])
        return aligned

    def value_augmented(self) -> np.ndarray:
        """A full forward of the value models over prefix and candidate, for each."""
        base = self.log_p("base")
        k, rule = self.spec.get("top_k", 20), self.spec.get("eos_value", "prefix")
        order = np.argsort(-base, kind="stable")
        best = order[:k]
        # Else rounding may decide who is a candidate, and the test says nothing.
        assert base[order[k - 1]] - base[order[k]] > 1e-5, "a tie: take another seed"
        found = base.copy()
        for term in self.spec["values"]:
            name = term["stream"]
            prefix = self.ids(name)
            after = {j: self.engine.heads[name].read([*prefix, int(j)]) for j in best}
            if EOS in after and rule == "prefix":
                after[EOS] = self.engine.heads[name].read(prefix)
            if rule == "zero":
                after.pop(EOS, None)
            mean = np.mean(list(after.values()))
            for j, value in after.items():
                found[j] += term.get("strength", 1.0) * (value - mean)
        return log_softmax(found)

    def decode(self, drawn: Sequence[int] | None = None) -> list[int]:
        for i in range(self.case.max_tokens):
            log_p = getattr(self, self.spec["method"])()
            assert np.isclose(np.exp(log_p).sum(), 1)
            token = int(log_p.argmax()) if drawn is None else drawn[i]
            self.response.append(token)
            self.wanted.append(float(log_p[token]))
        return self.response


OURS = ("critical_tokens", "value_augmented")


def assert_exact(engine: Engine, cases: Sequence[Case], outputs: Sequence[Any]) -> None:
    for case, output in zip(cases, outputs, strict=True):
        if case.spec is None or case.spec["method"] not in OURS:
            steps = engine.reference(case)
            want, numbers = [s.token for s in steps], [s.logprob for s in steps]
        else:
            slow = Slow(engine, case)
            want, numbers = slow.decode(), slow.wanted
        assert tokens(output) == want, case
        assert logprobs(output) == pytest.approx(numbers, abs=TOLERANCE), case
        ERRORS.extend(abs(a - b) for a, b in zip(logprobs(output), numbers, strict=True))


PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.9}
MASKED = {"method": "contrastive", "amateur": "plain", "strength": 0.5, "plausibility": 0.1}
GUIDED = {"method": "guidance", "negative": "twin", "strength": 1.5}
CRITICAL = {"method": "critical_tokens", "pretrained": "plain", "classifier": "critic"}
CRITICALS: list[dict[str, Any]] = [
    CRITICAL,
    {**CRITICAL, "mode": "soft"},
    {**CRITICAL, "classifier": "probe", "threshold": 0.85},
    {**CRITICAL, "classifier": "network", "threshold": 0.7},  # its body is not in the sum
    {**CRITICAL, "classifier": "defer", "aligned": "chat", "pretrained": "base"},
    {**CRITICAL, "classifier": "whole", "mode": "soft", "aligned": "chat"},
    {**CRITICAL, "classifier": "gpt", "aligned": "chat", "pretrained": "twin"},
]
OTHERS: list[dict[str, Any] | None] = [None, PROXY, MASKED, GUIDED]


def mixed(seed: int, specs: Sequence[dict[str, Any] | None], own: bool) -> list[Case]:
    """Cases of all methods, of many lengths, joining and leaving at different steps."""
    rng = random.Random(seed)
    cases = []
    for spec in specs:
        used = [s for s in ("chat", "plain", "critic", "whole") if f"'{s}'" in str(spec)]
        prompts = {s: prompt(rng, 1, 120) for s in used if own and rng.random() < 0.6}
        length, arrives = rng.randint(4, 10), rng.randrange(12)
        cases.append(Case(prompt(rng, 1, 90), spec, prompts, max_tokens=length, arrives=arrives))
    return cases


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_critical_tokens_beside_all_other_methods(headed: Engine, own: bool) -> None:
    cases = mixed(1 + own, [*CRITICALS, *OTHERS, *CRITICALS], own)
    assert_exact(headed, cases, headed.run(cases))


VALUE: dict[str, Any] = {
    "method": "value_augmented",
    "values": [{"stream": "value", "strength": 2.0}],
}
TWO = [{"stream": "kind", "strength": 1.5}, {"stream": "lora", "strength": 0.7}]
VALUES: list[dict[str, Any]] = [
    VALUE,
    {**VALUE, "top_k": 1},
    {**VALUE, "top_k": 5, "eos_value": "zero"},
    {**VALUE, "values": TWO, "top_k": 7, "eos_value": "model"},
    {**VALUE, "values": [*TWO, *VALUE["values"]], "eos_value": "zero"},
]


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_values_beside_all_other_methods(headed: Engine, own: bool) -> None:
    cases = mixed(11 + own, [*VALUES, *OTHERS, *CRITICALS[:4], *VALUES], own)
    assert_exact(headed, cases, headed.run(cases))


def test_preempted_requests_resume_with_the_same_answers(headed: Engine) -> None:
    rng = random.Random(14)
    specs = [VALUES[2], CRITICALS[0], VALUES[3], CRITICALS[1]]
    cases = [Case(prompt(rng, 70, 110), specs[i % 4], max_tokens=BLOCK + 8) for i in range(8)]
    before = headed.preemptions()
    outputs = headed.run(cases)
    assert headed.preemptions() > before
    assert_exact(headed, cases, outputs)


@pytest.mark.parametrize("rule", ["prefix", "zero", "model"])
def test_an_end_among_the_candidates(headed: Engine, rule: str) -> None:
    rng = random.Random(12)
    found: list[list[int]] = []
    while len(found) < 2:
        ids = prompt(rng, 400, 400)
        ranks = np.argsort(-scores(load(headed.folders["base"]), ids), -1)[:, :8]
        places = np.flatnonzero((ranks == EOS).any(-1))
        found += [ids[: places[0] + 1]] if places.size else []
    for ids in found:
        spec = {**VALUE, "top_k": 8, "eos_value": rule, "values": [{"stream": "value"}]}
        case = Case(ids, spec, max_tokens=1)
        assert EOS in np.argsort(-Slow(headed, case).log_p("base"))[:8]
        assert_exact(headed, [case], headed.run([case]))


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK])
def test_candidates_at_the_border_of_a_block(headed: Engine, length: int) -> None:
    rng = random.Random(length)
    own = {"value": prompt(rng, 2 * BLOCK, 2 * BLOCK)}
    cases = [
        Case(prompt(rng, length, length), VALUES[2], max_tokens=4),
        Case(prompt(rng, length, length), VALUES[2], own, max_tokens=4),
    ]
    assert_exact(headed, cases, headed.run(cases))


def test_prefix_cache_hits_of_values(headed: Engine) -> None:
    rng = random.Random(13)
    shared = prompt(rng, 2 * BLOCK + 5, 2 * BLOCK + 5)
    cases = [Case(shared, spec, max_tokens=3) for spec in (VALUES[2], {**VALUE, "top_k": 4})]
    cold = [headed.run([case], salt="values")[0] for case in cases]
    warm = [headed.run([case], salt="values")[0] for case in cases]
    assert [o.num_cached_tokens > 0 for o in cold] == [False, True]
    assert all(o.num_cached_tokens >= 2 * BLOCK for o in warm)
    assert_exact(headed, [*cases, *cases], [*cold, *warm])


def test_nothing_of_a_candidate_remains(headed: Engine) -> None:
    """The blocks that vLLM manages are the same, bit for bit, before and after candidates run."""
    from steering.worker.step.values import ValueStreams

    runner = headed.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context
    scheduler: Any = headed.llm.llm_engine.engine_core.engine_core.scheduler
    blocks = scheduler.kv_cache_config.num_blocks
    caches = {n: a.kv_cache for n, a in layers.items() if n.startswith(("value.", "kind."))}
    assert caches and all(len(cache) == 56 for cache in caches.values()) and blocks == 28
    changed: list[bool] = []

    def watched(self: ValueStreams, *args: Any) -> Any:
        before = {name: cache.clone() for name, cache in caches.items()}
        found = original(self, *args)
        for name, cache in caches.items():
            assert cache[:blocks].equal(before[name][:blocks])
            changed.append(not cache[blocks:].equal(before[name][blocks:]))
        return found

    original = ValueStreams.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValueStreams, "add", watched)
        headed.run([Case(prompt(random.Random(i), 20 + i, 20 + i), VALUE) for i in range(3)])
    assert any(changed), "the candidates' KV went somewhere else"


def test_candidates_cost_one_row_each_and_one_pass_together(headed: Engine) -> None:
    rng = random.Random(15)
    for k in (1, 20):
        before = headed.counters()
        case = Case(prompt(rng, 10, 10), {**VALUE, "top_k": k}, max_tokens=6, report="summary")
        output = headed.run([case])[0]
        after = headed.counters()
        grown = {w: after[w]["value"] - before[w]["value"] for w in ("tokens", "passes")}
        assert grown == {"tokens": 10 + 5 + 6 * k, "passes": 2 * 6}
        report = headed.report(headed.tags[0], output)["0"]
        assert report["passes"] == {"base": 6, "value": 12}


def test_values_of_strength_zero_have_the_bits_of_the_base(headed: Engine) -> None:
    rng = random.Random(16)
    ids = prompt(rng, 20, 20)
    zero = {**VALUE, "values": [{"stream": "value", "strength": 0}]}
    first, second = (headed.run([Case(ids, s)], salt=str(s))[0] for s in (None, zero))
    assert tokens(first) == tokens(second)
    assert logprobs(first) == logprobs(second)


def test_the_rules_act_on_some_tokens_and_not_on_others(headed: Engine) -> None:
    """Else the tests above would pass without them."""
    for spec in CRITICALS:
        if spec.get("mode") != "soft":
            slow = [Slow(headed, c) for c in mixed(7, [spec] * 3, own=False)]
            for one in slow:
                one.decode()
            critical = [q > spec.get("threshold", 0.5) for one in slow for q in one.critical]
            assert 0.1 < np.mean(critical) < 0.9, spec


def test_reports_say_which_tokens_were_critical_and_who_chose_them(headed: Engine) -> None:
    cases = [
        Case(prompt(random.Random(i), 30, 30), spec, report="tokens")
        for i, spec in enumerate(CRITICALS)
    ]
    outputs = headed.run(cases)
    for case, output, tag in zip(cases, outputs, headed.tags, strict=True):
        report = headed.report(tag, output)["0"]
        slow = Slow(headed, case)
        slow.decode()
        detail = report["detail"]
        got = [entry["critical_probability"] for entry in detail]
        assert got == pytest.approx(slow.critical, abs=1e-4)
        if slow.spec.get("mode") == "soft":
            assert not any("critical" in entry for entry in detail)
            continue
        marked = [q > slow.spec.get("threshold", 0.5) for q in slow.critical]
        assert [entry["critical"] for entry in detail] == marked
        assert report["critical"] == sum(marked)


def test_the_aligned_model_alone_ends_the_text(headed: Engine) -> None:
    """At a place where the pretrained model's most likely token is the end."""
    rng = random.Random(5)
    found = None
    while found is None:
        ids = prompt(rng, 400, 400)
        places = np.flatnonzero(scores(load(headed.folders["plain"]), ids).argmax(-1) == EOS)
        found = ids[: places[0] + 1] if places.size and places[0] > 5 else None
    for mode in ("hard", "soft"):
        spec = {**CRITICAL, "threshold": 0.0, "mode": mode}
        case = Case(found, spec, max_tokens=2, params={"ignore_eos": False})
        output = headed.run([case])[0]
        assert tokens(output)[0] != EOS
        assert_exact(headed, [case], [output])


def test_an_id_banned_behind_the_read_out_leaves_the_pretrained_models_next(
    headed: Engine,
) -> None:
    rng = random.Random(6)
    case = Case(prompt(rng, 20, 20), {**CRITICAL, "threshold": 0.0}, max_tokens=1)
    best = tokens(headed.run([case])[0])[0]
    params = {"logit_bias": {best: -100.0}}
    second = Case(case.prompt, case.spec, max_tokens=1, params=params)
    known = Slow(headed, case).log_p("plain")
    known[[best, EOS]] = -np.inf
    assert tokens(headed.run([second])[0]) == [known.argmax()]


def test_prefix_cache_hits_of_critical_tokens(headed: Engine) -> None:
    rng = random.Random(9)
    shared = prompt(rng, 2 * BLOCK + 5, 2 * BLOCK + 5)
    cases = [Case(shared, spec, max_tokens=5) for spec in CRITICALS[:3]]
    cold = [headed.run([case], salt="hits")[0] for case in cases]
    warm = [headed.run([case], salt="hits")[0] for case in cases]
    # The second differs in the rule only; the third needs no critic's KV.
    assert [o.num_cached_tokens > 0 for o in cold] == [False, True, False]
    assert all(o.num_cached_tokens >= 2 * BLOCK for o in warm)
    assert_exact(headed, [*cases, *cases], [*cold, *warm])


def test_prompt_log_probabilities_under_the_rules(headed: Engine) -> None:
    rng = random.Random(10)
    ids = prompt(rng, 40, 40)
    for spec in CRITICALS[:2]:
        case = Case(ids, spec, max_tokens=1, params={"prompt_logprobs": 0})
        output = headed.run([case])[0]
        for t in range(10, 40):
            slow = Slow(headed, Case(ids[:t], spec))
            log_p = slow.critical_tokens()[ids[t]]
            if np.isfinite(log_p):
                assert output.prompt_logprobs[t][ids[t]].logprob == pytest.approx(
                    log_p, abs=TOLERANCE
                )
