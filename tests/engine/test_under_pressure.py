"""The compiled engine with too little KV memory, and all that vLLM puts behind the read-out."""

from __future__ import annotations

import gc
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steering.engine_args import StreamSource, adapter_engine_args
from steering.method import Logits
from tests.adapters.make import make_lora
from tests.adapters.vectors import make_reft, make_vector
from tests.engine.driver import BLOCK, ON_V2, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.engine.test_vectors import hidden
from tests.injected import runner_of
from tests.models import VOCAB_SIZE, make_tokenizer

pytestmark = pytest.mark.engine

PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.9}
EFT = {
    "method": "emulated_fine_tuning",
    "tuned": "chat",
    "reference": "plain",
    "strength": 0.5,
    "delta_top_p": 0.9,
}
BLOCKS = 28
"""KV blocks: five requests of the longest kind below."""


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Compiled, few KV blocks; the base's table has 12 rows that are no token."""
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE + 12),
        {"chat": ("qwen2", VOCAB_SIZE), "plain": ("gpt2", VOCAB_SIZE), "twin": "base"},
        taps={
            "early": StreamSource(on="base", layer=1, norm=True),
            "embedded": StreamSource(on="base", layer=0, norm=False),
            "chat-early": StreamSource(on="chat", layer=2, norm=True),
        },
        num_gpu_blocks_override=BLOCKS,
        vectors=True,
        **adapter_engine_args(3, 16),
        enforce_eager=shutil.which("g++") is None,  # what torch compiles CPU kernels with
    )
    yield found
    del found
    gc.collect()


def test_preempted_requests_resume_with_the_same_answers(tight: Engine) -> None:
    rng = random.Random(1)
    guidance = {"method": "guidance", "negative": "twin", "strength": 1.2}
    owns = [{}, {"chat": prompt(rng, 60, 60)}, {"plain": prompt(rng, 130, 130)}]
    specs = [PROXY, EFT, None, guidance]
    cases = []
    for i in range(10):
        spec = specs[i % 4]
        own = owns[i % 3] if spec in (PROXY, EFT) else {}
        cases.append(Case(prompt(rng, 70, 110), spec, own, max_tokens=2 * BLOCK, report="summary"))
    before = tight.preemptions()
    outputs = tight.run(cases)
    assert tight.preemptions() > before
    assert_exact(tight, cases, outputs)
    for case, output, tag in zip(cases, outputs, tight.tags, strict=True):
        if case.spec is not None:
            assert tight.report(tag, output)["0"]["tokens"] == case.max_tokens


def test_every_stream_has_a_place_of_its_own_for_its_compiled_code(tight: Engine) -> None:
    """With one tag for all, vLLM takes what it compiled for one stream as another's."""
    if not tight.compiled:
        pytest.skip("needs g++")
    model = runner_of(tight.llm).get_model()
    found = {}
    for name, stream in model.adapted_streams.items():
        (found[name],) = {m._compile_tag for m in stream.modules() if hasattr(m, "_compile_tag")}
    assert found == {name: f"stream.{name}" for name in ("base", "chat", "plain")}


def test_padded_ids_are_never_drawn(tight: Engine) -> None:
    rng = random.Random(2)
    padded = range(VOCAB_SIZE, VOCAB_SIZE + 12)
    # Even when the request asks for them.
    hot = {"temperature": 2.0, "seed": 3, "n": 8, "logit_bias": dict.fromkeys(padded, 100.0)}
    output = tight.run([Case(prompt(rng, 8, 8), PROXY, max_tokens=40, params=hot)])[0]
    drawn = [t for choice in range(8) for t in tokens(output, choice)]
    assert len(set(drawn)) > 100
    assert max(drawn) < VOCAB_SIZE


def test_draws_follow_the_exact_distribution(tight: Engine) -> None:
    """Chi-square at an error rate of 1 in 10,000."""
    rng = random.Random(3)
    temperature = 0.8
    case = Case(prompt(rng, 12, 12), PROXY, {"chat": prompt(rng, 40, 40)}, max_tokens=1)
    exact = tight.reference(case, keep_logprobs=True)[0].logprobs
    assert exact is not None
    scaled = exact / temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    draws: Counter[int] = Counter()
    for seed in range(2 if ON_V2 else 4):  # V2 is interpreted here
        params = {"n": 500, "temperature": temperature, "seed": 1000 * seed}
        once = Case(case.prompt, case.spec, case.own, max_tokens=1, params=params)
        output = tight.run([once])[0]
        draws.update(tokens(output, i)[0] for i in range(500))
    total = sum(draws.values())
    common = np.flatnonzero(probability * total >= 5)
    seen = [draws[int(i)] for i in common]
    want = [probability[i] * total for i in common]
    seen.append(total - sum(seen))
    want.append(total - sum(want))
    assert stats.chisquare(seen, want).pvalue > 1e-4


def test_a_seed_survives_a_prompt_in_chunks(tight: Engine) -> None:
    rng = random.Random(4)
    params = {"temperature": 1.0, "seed": 11}
    long = Case(prompt(rng, 250, 250), PROXY, max_tokens=5, params=params)
    short = [Case(prompt(rng, 5, 5), max_tokens=20, params=params) for _ in range(3)]
    alone = tokens(tight.run([long], salt="alone")[0])
    together = tokens(tight.run([*short, long], salt="together")[-1])
    assert together == alone
    drawn = iter(alone)
    steps = tight.reference(long, choose=lambda _: next(drawn))
    assert len(steps) == 5


def test_penalties_act_on_the_steered_scores(tight: Engine) -> None:
    rng = random.Random(5)
    params = {"frequency_penalty": 1.5, "presence_penalty": 0.7}
    own = {"chat": prompt(rng, 50, 50)}
    case = Case(prompt(rng, 10, 10), PROXY, own, max_tokens=24, params=params)
    counts = np.zeros(VOCAB_SIZE + 12)

    def penalised(found: Logits) -> int:
        token = int((found - 1.5 * counts - 0.7 * (counts > 0)).argmax())
        counts[token] += 1
        return token

    want = [s.token for s in tight.reference(case, choose=penalised)]
    assert tokens(tight.run([case])[0]) == want
    plain = Case(case.prompt, PROXY, own, max_tokens=24)
    assert tokens(tight.run([plain])[0]) != want


def test_a_repetition_penalty_does_not_see_the_padding(tight: Engine) -> None:
    """The padding in front of a short base prompt repeats its first token: the same set."""
    rng = random.Random(6)
    ids = prompt(rng, 10, 10)
    params = {"repetition_penalty": 1.6}
    same = Case(ids, PROXY, {"chat": ids}, params=params)
    # A longer prompt that the twin reads at weight 0 leaves the sum as it is but pads the base.
    cases = [same, Case(ids, PROXY, {"chat": ids, "plain": ids}, params=params)]
    longer = Case(ids, PROXY, {"chat": prompt(rng, 40, 40)}, params=params)
    first, second = tight.run(cases)
    assert tokens(first) == tokens(second)
    output = tight.run([longer])[0]
    free = tight.run([Case(ids, PROXY, longer.own)])[0]
    assert len(set(tokens(output))) >= len(set(tokens(free)))


def test_banned_tokens_are_banned_after_mixing(tight: Engine) -> None:
    rng = random.Random(7)
    case = Case(prompt(rng, 10, 10), EFT, max_tokens=10)
    greedy = [s.token for s in tight.reference(case)]
    banned = set(greedy[:3])

    def without(found: Logits) -> int:
        allowed = found.copy()
        allowed[list(banned)] = -np.inf
        return int(allowed.argmax())

    want = [s.token for s in tight.reference(case, choose=without)]
    params = {"logit_bias": dict.fromkeys(banned, -100.0)}
    output = tight.run([Case(case.prompt, EFT, max_tokens=10, params=params)])[0]
    assert tokens(output) == want
    assert all(np.isfinite(logprobs(output)))


def test_structured_output_masks_the_steered_scores(tight: Engine) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    rng = random.Random(8)
    tokenizer = make_tokenizer()
    case = Case(prompt(rng, 10, 10), PROXY, {"chat": prompt(rng, 50, 50)}, max_tokens=6)
    digits = {i for t, i in tokenizer.get_vocab().items() if t.isdigit() and t.isascii()}

    def digit(found: Logits) -> int:
        allowed = np.full_like(found, -np.inf)
        allowed[list(digits)] = found[list(digits)]
        return int(allowed.argmax())

    want = [s.token for s in tight.reference(case, choose=digit)]
    params = {"structured_outputs": StructuredOutputsParams(regex="[0-9]{1000}")}
    output = tight.run([Case(case.prompt, PROXY, case.own, max_tokens=6, params=params)])[0]
    assert tokens(output) == want
    # vLLM's log-probabilities are those behind the grammar's mask.
    drawn = iter(want)
    free = tight.reference(case, choose=lambda _: next(drawn), keep_logprobs=True)
    masked = []
    for step in free:
        assert step.logprobs is not None
        masked.append(step.logprob - np.logaddexp.reduce(step.logprobs[list(digits)]))
    assert logprobs(output) == pytest.approx(masked, abs=TOLERANCE)


def test_taps_of_compiled_streams_survive_preemption(tight: Engine) -> None:
    rng = random.Random(11)
    specs: list[dict[str, Any] | None] = [
        {"method": "dola", "layers": ["early", "embedded"]},
        {"method": "sled", "layers": ["early"]},
        {"method": "mix", "weights": {"base": 1.0, "early": -0.3, "chat-early": 0.5}},
        None,
    ]
    before = tight.preemptions()
    cases = [Case(prompt(rng, 60, 120), spec, max_tokens=20) for spec in specs * 3]
    assert_exact(tight, cases, tight.run(cases, salt="taps"))
    assert tight.preemptions() > before


def test_vectors_of_compiled_streams_survive_preemption(
    tight: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With positions, on a twin and a companion, in front of taps, and beside LoRA."""
    folder, rng = tmp_path_factory.mktemp("vectors"), random.Random(12)
    for stream in ("base", "chat"):
        width, layers = hidden(tight.folders[stream])
        made = {
            f"{stream}-v": make_vector(folder / f"{stream}-v", width, range(layers), seed=13),
            f"{stream}-r": make_reft(folder / f"{stream}-r", width, range(layers), seed=14),
            f"{stream}-l": make_lora(folder / f"{stream}-l", tight.folders[stream], seed=15),
        }
        tight.load_adapters(made, stream)
    guidance = {"method": "guidance", "negative": "twin", "strength": 1.2}
    early = {"method": "mix", "weights": {"base": 1.0, "early": -0.3, "chat-early": 0.5}}
    asked: list[tuple[dict[str, Any] | None, tuple[Use, ...]]] = [
        (None, (Use("base-v", where='"reply"'), Use("base-l", 0.5))),
        (None, (Use("base-r", 0.5, where='{"prompt_last": 9, "from": 4}'),)),
        (guidance, (Use("base-v", -0.5, "twin"), Use("base-r", where='"prompt"'))),
        (early, (Use("base-v", 0.7), Use("chat-r", 0.5, "chat", where='{"first": 5}'))),
        (PROXY, (Use("chat-v", stream="chat", where='"reply"'), Use("chat-l", stream="chat"))),
        (None, ()),
    ]
    # Rows without adapters fill the blocks: of others so many run at once as there are slots.
    cases = [Case(prompt(rng, 90, 120), s, {}, 24, i % 5, adapters=own)
             for i, (s, own) in enumerate([*asked * 2, *asked[-1:] * 6])]  # fmt: skip
    before = tight.preemptions()
    assert_exact(tight, cases, tight.run(cases, salt="vectors"))
    assert tight.preemptions() > before
