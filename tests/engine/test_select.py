"""One of two streams for each token, probabilities that are added, masks: against the formulas."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steering.kernels.reference import log_softmax
from steering.kernels.truncation import kept_reference
from steering.wire import TOP_N_SIGMA
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


TRUNCATIONS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "min_p": ({"min_p": 0.05}, lambda z: np.exp(z - z.max()) >= 0.05),
    "top_n_sigma": ({"extra_args": {TOP_N_SIGMA: 1.5}}, lambda z: kept_reference(z, 1.5)),
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncation_is_of_the_steered_distribution(selecting: Engine, name: str) -> None:
    """As many draws as show each kept id, and how often; beside requests that ask for nothing.

    The base's own rows of padding are no token, for a plain request neither.
    """
    rng, draws = random.Random(6), 150
    params, kept_of = TRUNCATIONS[name]
    params = {**params, "temperature": 1.0, "n": draws, "seed": 4, "logprobs": None}
    ids = prompt(rng, 9, 20)
    specs = (SELECTS[0], MASKS[0], SELECTS[4], OTHERS[1], OTHERS[2], None)
    cases = [Case(ids, spec, max_tokens=1, params=params) for spec in specs]
    beside = Case(ids, OTHERS[1], max_tokens=3)
    *outputs, other = selecting.run([*cases, beside])
    assert_exact(selecting, [beside], [other])
    for case, output in zip(cases, outputs, strict=True):
        z = steered(selecting, case, [])
        if case.spec is None and name == "top_n_sigma":
            z = z.copy()
            z[VOCAB_SIZE:] = -np.inf
        kept = np.flatnonzero(kept_of(z))
        p = np.exp(log_softmax(z))[kept] / np.exp(log_softmax(z))[kept].sum()
        drawn = [tokens(output, i)[0] for i in range(draws)]
        counts = np.array([drawn.count(int(i)) for i in kept])
        assert counts.sum() == draws, (case.spec, "an id that is not kept was drawn")
        common = p * draws >= 5
        assert common.any()
        seen, want = [*counts[common]], [*(p[common] * draws)]
        if (rest := draws - sum(want)) > 5:
            seen, want = [*seen, draws - sum(seen)], [*want, rest]
        else:
            want = [w * sum(seen) / sum(want) for w in want]
        assert len(seen) == 1 or stats.chisquare(seen, want).pvalue > 1e-4, case.spec


def test_top_n_sigma_takes_what_constraints_leave(selecting: Engine) -> None:
    """Bans are in no standard deviation; joins and leaves move rows about."""
    rng = random.Random(7)
    cases = []
    for n in (0.4, 1.0, 0.0, 2.0, 0.7):
        args = {"extra_args": {TOP_N_SIGMA: n}} if n else {}
        params: dict[str, Any] = {"temperature": 1.0, "seed": 5, **args}
        spec = rng.choice([OTHERS[1], OTHERS[2], SELECTS[0], None])
        params["logit_bias"] = dict.fromkeys(range(5, 60), -1e6)
        length, arrives = rng.randint(3, 9), rng.randrange(5)
        case = Case(prompt(rng, 9, 60), spec, max_tokens=length, params=params, arrives=arrives)
        cases.append(case)
    outputs = selecting.run(cases)
    narrow = 0
    for case, output in zip(cases, outputs, strict=True):
        for at, token in enumerate(drawn := tokens(output)):
            z = steered(selecting, case, drawn[:at]).copy()
            z[VOCAB_SIZE:] = -np.inf
            for i, bias in case.params["logit_bias"].items():
                z[i] += bias
            n = case.params.get("extra_args", {}).get(TOP_N_SIGMA, 0.0)
            kept = kept_reference(z, n) if n else np.isfinite(z)
            assert kept[token], (case, at)
            narrow += bool(n) and kept.sum() < 100
    assert narrow > 10
