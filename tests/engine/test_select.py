"""One of two streams for each token, probabilities that are added, masks: against the formulas."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steering.kernels.reference import log_softmax
from tests.engine.driver import BLOCK, Case, Engine, logprobs, tokens
from tests.engine.heads import Headed, classifier, deferring, probe
from tests.engine.slow import assert_exact, raw, steered
from tests.engine.test_constraints import prompt
from tests.models import EOS, VOCAB_SIZE

pytestmark = pytest.mark.engine

TABLE = VOCAB_SIZE + 12
SELECT: dict[str, Any] = {"method": "select", "second": "chat"}
BY_HEAD = {**SELECT, "gate": "classifier", "classifier": "probe"}
DOUBT = {**SELECT, "gate": "confidence", "threshold": 0.4}
SELECTS: list[dict[str, Any]] = [
    {**SELECT, "gate": "constant"},
    {**SELECT, "gate": "constant", "share": 0.6, "second": "short"},
    BY_HEAD,
    {**BY_HEAD, "classifier": "defer", "ends": "first", "second": "short"},
    {**BY_HEAD, "greedy": True, "first": "plain", "second": "base"},
    {**BY_HEAD, "mode": "soft"},
    {**BY_HEAD, "mode": "soft", "threshold": 0.5, "classifier": "critic"},
    DOUBT,
    {**DOUBT, "ends": "second", "first": "chat", "second": "plain"},
    {**DOUBT, "mode": "soft", "threshold": 1.0},
]
MASKS: list[dict[str, Any]] = [
    {"method": "mix", "weights": {"base": 0.2, "chat": 0.8}, "top_k": 5},
    {"method": "mix", "weights": {"base": 1.0, "plain": -0.8}, "top_share": 0.1,
     "plausibility": 0.1},
    {"method": "mix", "weights": {"base": 1.0, "short": 0.7}, "plausibility": 0.2,
     "judge": "short"},
]  # fmt: skip
SAFE: dict[str, Any] = {"method": "safe_decoding", "expert": "twin"}
OTHERS: list[dict[str, Any] | None] = [
    None,
    {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.9},
    {"method": "contrastive", "amateur": "plain"},
    {"method": "emulated_fine_tuning", "tuned": "chat", "reference": "plain", "delta_top_p": 0.8},
]


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    return {
        "critic": classifier(folder / "critic", "llama", 11, tokens=True, labels=2),
        "defer": deferring(folder / "defer", 14, TABLE),
        "probe": probe(folder / "probe", bodies["base"], "base", 15),
    }


@pytest.fixture(scope="module")
def selecting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", TABLE),
        {
            "chat": ("qwen2", VOCAB_SIZE),
            "plain": ("gpt2", VOCAB_SIZE),
            "short": ("llama", VOCAB_SIZE - 10),
            "twin": "base",
        },
        make_heads,
    )
    yield found
    del found
    gc.collect()


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_selections_and_masks_beside_all_other_methods(selecting: Engine, own: bool) -> None:
    rng = random.Random(own)
    cases = []
    for spec in [*SELECTS, *MASKS, SAFE, {**SAFE, "expert": "short", "tokens": 3}, *OTHERS]:
        named = [s for s in ("chat", "twin") if f"'{s}'" in str(spec)]
        prompts = {s: prompt(rng, 1, 90) for s in named if own}
        cases.append(
            Case(prompt(rng, 1, 90), spec, prompts, max_tokens=6, arrives=rng.randrange(8))
        )
    assert_exact(selecting, cases, selecting.run(cases))


def test_both_sides_of_each_gate_are_seen(selecting: Engine) -> None:
    rng = random.Random(3)
    for spec, head in ((BY_HEAD, "probe"), (DOUBT, None)):
        cases = [Case(prompt(rng, 9, 30), spec, max_tokens=5) for _ in range(6)]
        outputs = selecting.run(cases)
        assert_exact(selecting, cases, outputs)
        opened = set()
        for case, output in zip(cases, outputs, strict=True):
            for n in range(5):
                reply = tokens(output)[:n]
                if head is not None:
                    opened.add(selecting.heads[head].read([*case.prompt, *reply]) > 0)
                else:
                    p = np.exp(log_softmax(raw(selecting, case, "base", reply, TABLE)))
                    opened.add(bool(p.max() < 0.4))
        assert opened == {True, False}, spec


def test_who_may_end_the_text(selecting: Engine) -> None:
    """A request's own stop ids are among them."""
    rng = random.Random(4)
    for ends, spec in (
        ("second", {**DOUBT, "threshold": 0.0}),
        ("first", {**DOUBT, "threshold": 1.0}),
    ):
        plain = Case(prompt(rng, 20, 20), {**spec, "ends": ends}, max_tokens=1)
        stop = int(np.argmax(steered(selecting, plain, [])))
        case = Case(plain.prompt, plain.spec, max_tokens=1, params={"stop_token_ids": [stop]})
        (output,) = selecting.run([case])
        z = steered(selecting, plain, [], [EOS, stop])
        assert int(z.argmax()) != stop
        assert tokens(output) == [int(z.argmax())]
        assert logprobs(output) == pytest.approx([log_softmax(z).max()], abs=1e-4)


def test_preemption_and_prefix_hits(selecting: Engine) -> None:
    rng = random.Random(5)
    shared = prompt(rng, 2 * BLOCK + 5, 2 * BLOCK + 5)
    cases = [Case(shared, spec, max_tokens=4) for spec in (BY_HEAD, DOUBT, SAFE, MASKS[0])]
    cold = selecting.run(cases, salt="select")
    warm = selecting.run(cases, salt="select")
    assert all(o.num_cached_tokens >= 2 * BLOCK for o in warm)
    assert_exact(selecting, [*cases, *cases], [*cold, *warm])


def test_min_p_is_of_the_steered_distribution(selecting: Engine) -> None:
    rng = random.Random(6)
    for spec in (SELECTS[0], MASKS[0], OTHERS[1]):
        params = {"min_p": 0.3, "temperature": 1.0, "n": 24, "seed": 4}
        case = Case(prompt(rng, 9, 20), spec, max_tokens=1, params=params)
        (output,) = selecting.run([case])
        p = np.exp(log_softmax(steered(selecting, case, [])))
        kept = set(np.flatnonzero(p >= 0.3 * p.max()).tolist())
        drawn = {t for i in range(24) for t in tokens(output, i)}
        assert drawn <= kept
