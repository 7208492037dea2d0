"""Taps in a real engine, against `transformers`' hidden states."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from steering.engine_args import StreamSource
from tests.engine.driver import BLOCK, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import assert_exact, prompt
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

TAPS = {
    "embedded": StreamSource(on="base", layer=0, norm=False),
    "early": StreamSource(on="base", layer=1, norm=True),
    "raw": StreamSource(on="base", layer=1, norm=False),
    "other-early": StreamSource(on="other", layer=2, norm=True),
    "twin-early": StreamSource(on="twin", layer=1, norm=True),
}

DOLA: dict[str, Any] = {"method": "dola", "layers": ["embedded", "early", "raw"]}

SPECS: list[dict[str, Any] | None] = [
    DOLA,
    {**DOLA, "jsd": True, "relative_top": 0.02},
    {"method": "dola", "layers": ["early"]},
    None,
    {"method": "dola", "layers": ["raw"], "relative_top": 1.0},
    {"method": "sled", "layers": ["embedded", "early"], "rate": 1.5, "top_k": 7},
    {"method": "sled", "layers": ["raw"], "top_k": 128},
    {"method": "contrastive", "amateur": "early", "strength": 0.4},
    {"method": "mix", "weights": {"base": 1.0, "early": -0.3, "raw": 0.2, "other": 0.4}},
    {"method": "mix", "weights": {"base": 0.0, "early": 1.0}},
    {"method": "mix", "weights": {"base": 0.7, "other-early": 0.6}},
    {"method": "mix", "weights": {"base": 0.7, "early": 0.2, "short": 0.5}},
    {"method": "mix", "weights": {"base": 0.7, "twin-early": 0.6, "twin": -0.2, "early": 0.1}},
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A padded Llama with companions, one short of ids, a twin, and taps; it takes adapters."""
    from steering.engine_args import adapter_engine_args

    found = Engine(
        tmp_path_factory.mktemp("taps"),
        ("llama", VOCAB_SIZE + 12),
        {
            "other": ("qwen2", VOCAB_SIZE),
            "short": ("gpt2", VOCAB_SIZE - 10),
            "twin": "base",
        },
        taps=TAPS,
        vectors=True,
        **adapter_engine_args(2, 8),
    )
    yield found
    del found
    gc.collect()


def cases(seed: int, own: bool, reports: bool = True) -> list[Case]:
    """All of `SPECS` in one batch, joining and leaving at different steps."""
    rng = random.Random(seed)
    found = []
    for spec in SPECS * 2:
        used = [s for s in ("other", "twin") if spec is not None and f"'{s}" in str(spec)]
        found.append(
            Case(
                prompt(rng, 1, 150),
                spec,
                {s: prompt(rng, 1, 120) for s in used} if own else {},
                max_tokens=rng.randint(3, 10),
                arrives=rng.randrange(10),
                report=rng.choice(["off", "summary", "tokens"]) if spec and reports else "off",
            )
        )
    return found


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_taps_are_the_hidden_states_of_transformers(engine: Engine, own: bool) -> None:
    """Mixed batches, chunked prompts, dynamic layers, beside plain rows."""
    tried = cases(1 + own, own)
    assert_exact(engine, tried, engine.run(tried))


def test_a_prompt_that_was_cached_by_plain_rows_is_used(engine: Engine) -> None:
    rng = random.Random(3)
    shared = prompt(rng, 100, 100)
    tried = [Case(shared, spec) for spec in (None, DOLA, SPECS[5], SPECS[7])]
    outputs = [engine.run([case], salt="hits")[0] for case in tried]
    assert [o.num_cached_tokens >= 2 * BLOCK for o in outputs] == [False, True, True, True]
    assert_exact(engine, tried, outputs)


def test_a_report_counts_no_pass_for_a_tap(engine: Engine) -> None:
    case = Case(prompt(random.Random(4), 20, 20), DOLA, report="tokens")
    output = engine.run([case])[0]
    steps = engine.reference(case)
    report = engine.report(engine.tags[0], output)["0"]
    assert report["passes"] == {"base": len(steps)}
    assert report["kl_sum"] == pytest.approx(sum(s.kl for s in steps), abs=1e-3)
    for got, want in zip(report["detail"], steps, strict=True):
        assert got["steered_logprob"] == pytest.approx(want.logprob, abs=1e-4)
        assert {*got["choices"]} == {"base", "embedded", "early", "raw"}


def test_prompt_log_probabilities(engine: Engine) -> None:
    from tests.reference import prompt_logprobs

    for spec in (DOLA, SPECS[5], SPECS[8]):
        plain = Case(prompt(random.Random(5), 110, 110), spec, max_tokens=1)
        case = Case(plain.prompt, spec, max_tokens=1, params={"prompt_logprobs": 0})
        output = engine.run([case, Case(plain.prompt[:30], SPECS[2], max_tokens=3)])[0]
        plan = engine.plan(case)
        assert plan is not None
        names = (*engine.streams(case), *plan.taps)
        models = {name: engine.model(name) for name in names}
        want = prompt_logprobs(models, case.prompt, engine.mix(case))
        for t, entry in enumerate(output.prompt_logprobs[1:]):
            token = case.prompt[t + 1]
            assert entry[token].logprob == pytest.approx(want[t, token], abs=1e-4)


def test_a_tap_follows_the_adapters_of_its_stream(engine: Engine, tmp_path: Any) -> None:
    from tests.adapters.make import make_lora
    from tests.adapters.vectors import make_vector

    base = engine.folders["base"]
    lora = make_lora(tmp_path / "lora", base, seed=3, targets=["q_proj", "down_proj"])
    # What a vector adds behind layer 0 is in front of layer 1, where the taps read.
    vector = make_vector(tmp_path / "vector", 128, range(2), seed=4)
    engine.load_adapters({"lora": lora, "vector": vector})
    rng = random.Random(6)
    plain = [Case(prompt(rng, 30, 90), spec, max_tokens=6) for spec in (DOLA, *SPECS[7:10])]
    tried = [
        Case(c.prompt, c.spec, max_tokens=6, adapters=(Use(name, 0.8),))
        for c in plain
        for name in ("lora", "vector")
    ] + plain
    assert_exact(engine, tried, engine.run(tried))


def test_repetition_penalty_stands_behind_the_contrast(engine: Engine) -> None:
    """It depends on the sign of a score: scores are log p − log p_j, not differences of raw ones.

    The prompt's ids count as repeated, so the penalised scores are the formula's own.
    """
    import numpy as np

    from steering.method import log_softmax

    case = Case(
        prompt(random.Random(7), 40, 40),
        {"method": "dola", "layers": ["raw"]},
        max_tokens=1,
        params={"repetition_penalty": 1.3},
    )
    output = engine.run([case])[0]
    (step,) = engine.reference(case, keep_logprobs=True)
    assert step.logprobs is not None
    from tests.reference import scores

    final, early = (
        scores(engine.model(name), case.prompt)[-1][:VOCAB_SIZE] for name in ("base", "raw")
    )
    z = log_softmax(final) - log_softmax(early)
    kept = log_softmax(final) >= log_softmax(final).max() + np.log(0.1)
    seen = np.isin(np.arange(VOCAB_SIZE), case.prompt)
    z = np.where(kept, np.where(seen, np.where(z > 0, z / 1.3, z * 1.3), z), -np.inf)
    assert tokens(output) == [int(z.argmax())]
    assert logprobs(output) == pytest.approx([float(log_softmax(z).max())], abs=1e-4)
