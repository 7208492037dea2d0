"""Every rule under every hard constraint: the best id that is allowed is drawn, with a number."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering import broken
from steering.kernels.reference import Scores, log_softmax, mix_reference
from steering.phases import holding
from steering.plan import BASE, Recipe
from tests.engine.driver import Case, Engine, logprobs, tokens
from tests.engine.heads import Headed, probe, valued
from tests.models import EOS, SPECIAL, VOCAB_SIZE, make_tokenizer
from tests.reference import load, scores

pytestmark = pytest.mark.engine

TABLE = VOCAB_SIZE + 12
"""Rows of the base: the last 12 are no token."""
LACKED = range(VOCAB_SIZE - 10, VOCAB_SIZE)
"""What `short` lacks."""
TOLERANCE = 1e-3
"""Nats, of log-probabilities down to −1000 in float32."""

CRITICAL = {"method": "critical_tokens", "pretrained": "plain", "classifier": "critic"}
RULES: dict[str, dict[str, Any] | None] = {
    "base": None,
    "sum": {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"},
    "sum that lacks": {"method": "mix", "weights": {"base": 0.6, "short": 0.7}},
    "without the base": {"method": "mix", "weights": {"base": 0.0, "short": 1.0}},
    "base subtracted": {"method": "mix", "weights": {"base": -0.2, "chat": 0.4, "short": 1.0}},
    "plausible": {"method": "contrastive", "amateur": "plain", "plausibility": 1.0},
    "plausible, lacks": {"method": "contrastive", "amateur": "short", "plausibility": 0.9},
    "plausible, strong": {"method": "contrastive", "amateur": "chat", "strength": 9.0},
    "nucleus": {
        "method": "emulated_fine_tuning",
        "tuned": "short",
        "reference": "chat",
        "delta_top_p": 0.5,
    },
    "critical": {**CRITICAL, "threshold": 0.0},
    "critical, lacks": {**CRITICAL, "pretrained": "short", "threshold": 0.0},
    "not critical": {**CRITICAL, "threshold": 1.0},
    "critical, soft": {**CRITICAL, "mode": "soft"},
    "critical, soft, lacks": {**CRITICAL, "pretrained": "short", "mode": "soft"},
    "values": {
        "method": "value_augmented",
        "top_k": 2,
        "values": [{"stream": "value", "strength": 1.0}],
    },
    "the likely ids": {"method": "mix", "weights": {"base": 0.4, "short": 0.6}, "top_k": 2},
    "a share": {"method": "select", "second": "short", "gate": "constant", "share": 0.4},
    "one stream": {"method": "select", "second": "chat", "gate": "confidence", "threshold": 1.0},
    "one stream, lacks": {
        "method": "select",
        "second": "short",
        "gate": "confidence",
        "threshold": 1.0,
        "ends": "second",
    },
    "shared ids": {"method": "safe_decoding", "expert": "chat", "strength": 1.2},
    "shared ids, lacks": {
        "method": "safe_decoding",
        "expert": "short",
        "shared": 2,
        "strength": 1.2,
    },
}


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    return {
        "critic": probe(folder / "critic", bodies["base"], "base", 15),
        "value": valued(folder / "value", "qwen2", 21),
    }


@pytest.fixture(scope="module")
def constrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", TABLE),
        {
            "chat": ("qwen2", VOCAB_SIZE),
            "plain": ("gpt2", VOCAB_SIZE),
            "short": ("llama", VOCAB_SIZE - 10),
        },
        make_heads,
    )
    yield found
    del found
    gc.collect()


def prompt(rng: random.Random, low: int, high: int) -> list[int]:
    """Random tokens that every stream has."""
    return [rng.randrange(len(SPECIAL), LACKED[0]) for _ in range(rng.randint(low, high))]


def steered(engine: Engine, case: Case, ids: Sequence[int], ends: Sequence[int] = (EOS,)) -> Scores:
    """[TABLE] the definition's scores after some ids; with values, those of the other ids."""
    plan = engine.plan(case)
    part = None if plan is None else holding(plan, ids[len(case.prompt) :]) or plan
    weights = {BASE: 1.0} if part is None else dict(part.weights)
    rows: dict[str, Any] = {}
    for name in {BASE, *weights} - engine.heads.keys():
        own = scores(load(engine.folders[name]), ids)[-1][:TABLE]
        rows[name] = np.concatenate([own, np.full(TABLE - own.size, -np.inf)])
        if part is None or (part is plan and plan.phases):  # the base alone, behind a phase
            return own
        rows[name][VOCAB_SIZE:] = -np.inf
    assert part is not None
    if part.rule.head:
        rows[part.rule.head] = np.array([engine.heads[part.rule.head].read(ids)])
    return mix_reference(Recipe(weights, part.rule), rows, ends)


def grammar(kind: str, spec: Any) -> list[int]:
    """The ids with which a text may begin, by the grammar's own library."""
    import json

    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(make_tokenizer(), vocab_size=TABLE)
    compiler = xgrammar.GrammarCompiler(info)
    if kind == "regex":
        found = compiler.compile_regex(spec)
    elif kind == "choice":
        found = compiler.compile_regex("|".join(spec))
    else:
        found = compiler.compile_json_schema(json.dumps(spec))
    matcher, mask = xgrammar.GrammarMatcher(found), xgrammar.allocate_token_bitmask(1, TABLE)
    matcher.fill_next_token_bitmask(mask)
    bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:TABLE]
    return [int(i) for i in np.flatnonzero(bits) if i < VOCAB_SIZE]


def structured(kind: str, spec: Any) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**{kind: spec})}


Constraint = Callable[[Scores], tuple[dict[str, Any], Sequence[int]]]
"""Scores → sampling parameters, and the ids that they allow."""

TEXTS = [make_tokenizer().decode([i]) for i in range(VOCAB_SIZE)]


def few(z: Scores) -> tuple[dict[str, Any], Sequence[int]]:
    allowed = [*(int(i) for i in np.argsort(z[:VOCAB_SIZE])[5:8]), LACKED[3]]
    return {"allowed_token_ids": allowed}, allowed


def only_lacked(_: Scores) -> tuple[dict[str, Any], Sequence[int]]:
    return {"allowed_token_ids": [*LACKED]}, LACKED


def words(z: Scores) -> tuple[dict[str, Any], Sequence[int]]:
    """The most likely tokens that are words of their own are bad."""
    order = [int(i) for i in np.argsort(-z) if i < VOCAB_SIZE]
    encode = make_tokenizer().encode
    bad = [TEXTS[i] for i in order[:60] if encode(TEXTS[i].strip()) == [i] and TEXTS[i].strip()]
    forbidden = set()
    for word in bad:
        # vLLM also bans the word behind a space, if that has as many tokens.
        alone, behind = encode(word.strip()), encode(f" {word.strip()}")
        forbidden |= {alone[0]} | ({behind[0]} if len(behind) == 1 else set())
    assert forbidden & set(order[:10])
    return {"bad_words": bad}, sorted(set(range(VOCAB_SIZE)) - forbidden)


def no_end_yet(z: Scores) -> tuple[dict[str, Any], Sequence[int]]:
    stops = [int(i) for i in np.argsort(-z)[:9]]
    params = {"min_tokens": 2, "max_tokens": 2, "stop_token_ids": stops, "ignore_eos": False}
    return params, sorted(set(range(VOCAB_SIZE)) - {*stops, EOS})


def biased(z: Scores) -> tuple[dict[str, Any], Sequence[int]]:
    best = [int(i) for i in np.argsort(-z)[:9]]
    bias = dict.fromkeys(best, -100.0)
    return {"logit_bias": bias}, sorted(set(range(VOCAB_SIZE)) - set(best))


def by_grammar(kind: str, spec: Any) -> Constraint:
    return lambda _: (structured(kind, spec), grammar(kind, spec))


CONSTRAINTS: dict[str, Constraint] = {
    "allowed_token_ids": few,
    "allowed_token_ids that a stream lacks": only_lacked,
    "bad_words": words,
    "min_tokens": no_end_yet,
    "logit_bias": biased,
    "regex": by_grammar("regex", "[0-9]{3}"),
    "choice": by_grammar("choice", ["zebra", "yes"]),
    "json": by_grammar("json", {"type": "object", "properties": {"a": {"type": "boolean"}}}),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_best_id_that_is_allowed_is_drawn(constrained: Engine, constraint: str) -> None:
    cases, wanted = [], []
    for number, spec in enumerate(RULES.values()):
        plain = Case(prompt(random.Random(number), 12, 30), spec)
        z = steered(constrained, plain, plain.prompt)
        params, allowed = CONSTRAINTS[constraint](z)
        # A stop id of the request's own ends its text for the rule too.
        z = steered(constrained, plain, plain.prompt, [EOS, *params.get("stop_token_ids", ())])
        if "structured_outputs" in params:  # log-probabilities are behind the grammar
            z = np.where(np.isin(np.arange(z.size), allowed), z, -np.inf)
        else:
            params["logprobs"] = 3
        tokens_ = params.pop("max_tokens", 1)
        cases.append(Case(plain.prompt, spec, max_tokens=tokens_, params=params))
        wanted.append((z, list(allowed)))
    outputs = constrained.run(cases)
    for name, output, (z, allowed) in zip(RULES, outputs, wanted, strict=True):
        best = allowed[int(z[allowed].argmax())]
        assert tokens(output)[0] == best, name
        entries = output.outputs[0].logprobs[0]
        assert all(np.isfinite(entry.logprob) for entry in entries.values()), name
        if name != "values" or best not in np.argsort(-z)[:2]:
            assert np.isfinite(z[best]), name
        if name != "values":
            assert logprobs(output)[0] == pytest.approx(log_softmax(z)[best], abs=TOLERANCE), name


NOTHING: dict[str, dict[str, Any]] = {
    "padding": {"allowed_token_ids": [VOCAB_SIZE + 3]},
    "contradiction": {"allowed_token_ids": [40], "min_tokens": 1, "stop_token_ids": [40]},
    "grammar and ids": {"allowed_token_ids": [3], **structured("regex", "[0-9]{3}")},
    "grammar without text": structured("json", {"$ref": "#"}),
}


@pytest.mark.parametrize("rule", ["sum", "plausible", "critical"])
def test_constraints_that_leave_nothing_end_the_request_and_no_other(
    constrained: Engine, rule: str
) -> None:
    rng = random.Random(4)
    ids = prompt(rng, 9, 20)
    good = Case(ids, RULES[rule], max_tokens=3)
    alone = constrained.run([good])[0]
    cases = [good, *(Case(ids, RULES[rule], params=p) for p in NOTHING.values()), good]
    first, *ended, last = constrained.run(cases)
    for output in (first, last):
        assert tokens(output) == tokens(alone)
        assert logprobs(output) == pytest.approx(logprobs(alone), abs=1e-5)
    for name, output in zip(NOTHING, ended, strict=True):
        (choice,) = output.outputs
        assert (choice.finish_reason, list(choice.token_ids)) == ("error", []), name
        assert broken.fault_of_caller(choice.stop_reason) is not None, name
        said = broken.NO_TEXT if name == "grammar without text" else broken.NOTHING_LEFT
        assert said in choice.stop_reason, name


def test_replies_of_several_tokens_keep_to_the_few_ids_that_are_allowed(
    constrained: Engine,
) -> None:
    rng = random.Random(3)
    allowed = sorted(rng.sample(range(10, LACKED[0]), 4))
    names = [name for name in RULES if name != "values"]
    cases = [
        Case(prompt(rng, 9, 20), RULES[name], params={"allowed_token_ids": allowed}, max_tokens=4)
        for name in names
    ]
    for name, case, output in zip(names, cases, constrained.run(cases), strict=True):
        ids = list(case.prompt)
        for token, found in zip(tokens(output), logprobs(output), strict=True):
            z = steered(constrained, case, ids)
            assert token == allowed[int(z[allowed].argmax())], name
            assert found == pytest.approx(log_softmax(z)[token], abs=TOLERANCE), name
            ids.append(token)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rest", [{}, {"top_p": 0.99}, {"min_p": 0.001}], ids=str)
def test_what_is_set_back_is_never_drawn_of_itself(
    constrained: Engine, temperature: float, rest: dict[str, Any]
) -> None:
    rng = random.Random(8)
    names = ["plausible", "plausible, strong", "without the base", "critical"]
    params = {"temperature": temperature, "n": 24, "seed": 5, **rest}
    cases = [Case(prompt(rng, 9, 20), RULES[n], params=params, max_tokens=1) for n in names]
    for name, case, output in zip(names, cases, constrained.run(cases), strict=True):
        z = steered(constrained, case, case.prompt)
        drawn = {t for i in range(24) for t in tokens(output, i)}
        assert all(z[t] > z.max() - 100 for t in drawn), name


def test_no_bias_lifts_what_is_set_back(constrained: Engine) -> None:
    rng = random.Random(9)
    for name in ("plausible", "plausible, strong", "critical"):
        case = Case(prompt(rng, 9, 20), RULES[name])
        z = steered(constrained, case, case.prompt)
        kept = int(z.argmax())
        others = [int(i) for i in np.argsort(-z)[1:VOCAB_SIZE] if z[i] < z[kept] - 200]
        bias = {kept: -99.0, **dict.fromkeys(others[:50], 100.0)}
        case = Case(case.prompt, case.spec, params={"logit_bias": bias}, max_tokens=1)
        assert tokens(constrained.run([case])[0])[0] not in others


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_penalties_see_one_scale_in_every_row(constrained: Engine, mode: str) -> None:
    """A repetition penalty divides positive scores and multiplies negative ones."""
    rng = random.Random(12)
    spec = {**CRITICAL, "mode": mode}
    penalty = 1.3
    params = {"repetition_penalty": penalty}
    cases = [Case(prompt(rng, 60, 90), spec, params=params, max_tokens=8) for _ in range(4)]
    critical = []
    for case, output in zip(cases, constrained.run(cases), strict=True):
        ids = list(case.prompt)
        for token in tokens(output):
            z = steered(constrained, case, ids)
            seen = np.unique(ids)
            z[seen] = np.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
            assert token == z.argmax()
            critical.append(constrained.heads["critic"].read(ids) > 0)
            ids.append(token)
    assert {True, False} == set(critical), "both kinds of rows"


def test_a_requests_own_stop_ids_end_its_text_in_the_rules(constrained: Engine) -> None:
    """The pretrained model may not end a reply, by whatever id the request says ends it."""
    rng = random.Random(13)
    ids = prompt(rng, 20, 20)
    for mode in ("hard", "soft"):
        spec = {**CRITICAL, "threshold": 0.0, "mode": mode}
        case = Case(ids, spec, max_tokens=1)
        best = int(steered(constrained, case, ids).argmax())
        stops = {"stop_token_ids": [best]}
        beside = [case, Case(ids, spec, max_tokens=1, params=stops), case]
        outputs = constrained.run(beside)
        for one, output in zip(beside, outputs, strict=True):
            own = one.params.get("stop_token_ids", [])
            z = steered(constrained, case, ids, [EOS, *own])
            assert tokens(output) == [z.argmax()]
            assert logprobs(output) == pytest.approx([log_softmax(z).max()], abs=1e-4)
        assert mode == "soft" or tokens(outputs[1]) != tokens(outputs[0])


@pytest.mark.parametrize("rule", ["prefix", "zero", "model"])
def test_a_requests_own_stop_ids_end_its_text_for_values(constrained: Engine, rule: str) -> None:
    from steering.kernels.reference import value_offsets

    ids, k = prompt(random.Random(14), 20, 20), 4
    spec = {
        "method": "value_augmented",
        "top_k": k,
        "eos_value": rule,
        "values": [{"stream": "value", "strength": 2.0}],
    }
    base = log_softmax(scores(load(constrained.folders[BASE]), ids)[-1][:VOCAB_SIZE])
    best = np.argsort(-base)[:k]
    stop = int(best[1])
    read = constrained.heads["value"].read
    offsets = value_offsets(
        np.array([read([*ids, int(j)]) for j in best]),
        read(ids),
        best == stop,
        rule,  # type: ignore[arg-type]
    )
    base[best] += 2.0 * offsets
    params = {"stop_token_ids": [stop], "logprobs": k}
    output = constrained.run([Case(ids, spec, max_tokens=1, params=params)])[0]
    entries = output.outputs[0].logprobs[0]
    want = log_softmax(base)
    for token, entry in entries.items():
        assert entry.logprob == pytest.approx(want[token], abs=1e-4)
    assert stop in entries


def test_random_control_does_no_harm(constrained: Engine) -> None:
    """VLLM's dummy sampler run passes random bits where rows of requests have their plans."""
    model = constrained.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    width = model._readout.layout.width
    found = model.compute_logits(torch.randn(5, width, generator=torch.Generator().manual_seed(1)))
    assert found.shape == (5, TABLE)
