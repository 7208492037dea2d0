"""Our own methods: the conformance kit, and the identities that the papers state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.kernels.reference import log_softmax, mix_reference
from steering.method import Limits, Logits, Method, Snapshot
from steering.methods.best_of_n import BestOfN
from steering.methods.context_aware import ContextAware
from steering.methods.contrastive import Contrastive
from steering.methods.critical_tokens import CriticalTokens
from steering.methods.dola import Dola
from steering.methods.emulated_fine_tuning import EmulatedFineTuning
from steering.methods.guidance import Guidance
from steering.methods.guided_search import GuidedSearch
from steering.methods.mix import Mix
from steering.methods.proxy_tuning import ProxyTuning
from steering.methods.safe_decoding import SafeDecoding
from steering.methods.select import Select
from steering.methods.sled import Sled
from steering.methods.value_augmented import ValueAugmented
from steering.plan import Recipe, Rule, RuleKind
from steering.plugins import BUILT_INS, discover
from steering.resolve import parse
from steering.testing import MethodConformance

PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
SCALE = {"method": "emulated_fine_tuning", "tuned": "chat", "reference": "plain"}
REWARDS = {
    "method": "emulated_fine_tuning",
    "rewards": [{"tuned": "chat", "weight": 0.7}, {"tuned": "twin", "weight": 0.3}],
    "reference": "plain",
}
CONTRAST = {"method": "contrastive", "amateur": "plain"}
CONTEXT = {"method": "context_aware", "without": "twin"}
GUIDE = {"method": "guidance", "negative": "twin"}
CRITICAL = {"method": "critical_tokens", "pretrained": "plain", "classifier": "critic"}
VALUE: dict[str, Any] = {
    "method": "value_augmented",
    "values": [{"stream": "value", "strength": 2.0}],
}
BEST = {"method": "best_of_n", "value": "value"}
SEARCH: dict[str, Any] = {"method": "guided_search", "score": {"value": "value"}}
RATIO = {"log_ratio": {"of": "chat", "to": "plain"}}
NAN = float("nan")
INF = float("inf")

STREAMS = {"base": "lm", "chat": "lm", "plain": "lm", "twin": "lm"}
METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        ProxyTuning(),
        EmulatedFineTuning(),
        Contrastive(),
        Mix(),
        ContextAware(),
        Guidance(),
        CriticalTokens(),
        ValueAugmented(),
        BestOfN(),
        Dola(),
        Sled(),
        GuidedSearch(),
        Select(),
        SafeDecoding(),
    )
}


class TestProxyTuning(MethodConformance):
    method = ProxyTuning()
    configs = (
        PROXY,
        {**PROXY, "strength": 0.3, "report": True},
        {**PROXY, "expert": "base", "strength": 2.5},
        {**PROXY, "anti_expert": "base", "strength": 1.0},
        {**PROXY, "prompts": {"chat": {"prompt": "Hello"}}, "report": "tokens"},
    )
    zero_config = {**PROXY, "strength": 0}
    bad_configs = (
        ({**PROXY, "strength": -0.1}, "strength"),
        ({**PROXY, "strength": 10.1}, "strength"),
        ({**PROXY, "strength": NAN}, "strength"),
        ({**PROXY, "strength": "0.5"}, "strength"),
        ({**PROXY, "strength": True}, "strength"),
        ({**PROXY, "anti_expert": "chat"}, "anti_expert"),
        ({**PROXY, "expert": "nobody"}, "expert"),
        ({**PROXY, "expert": "value"}, "expert"),
        ({**PROXY, "alpha": 1}, "alpha"),
        ({**PROXY, "report": "all"}, "report"),
        ({"method": "proxy_tuning", "expert": "chat"}, "anti_expert"),
    )


TAPPED = {
    "streams": {**MethodConformance.streams, "l0": "lm", "l2": "lm", "of-chat": "lm"},
    "taps": {"l0": "base", "l2": "base", "of-chat": "chat"},
}
DOLA: dict[str, Any] = {"method": "dola", "layers": ["l0", "l2"]}
SLED: dict[str, Any] = {"method": "sled", "layers": ["l0", "l2"]}


class TestDola(MethodConformance):
    method = Dola()
    streams, taps = TAPPED["streams"], TAPPED["taps"]
    configs = (
        DOLA,
        {**DOLA, "jsd": True},
        {**DOLA, "layers": ["l2"]},
        {**DOLA, "relative_top": 1.0, "report": "tokens"},
    )
    zero_config = None
    bad_configs = (
        ({**DOLA, "layers": []}, "layers"),
        ({"method": "dola"}, "layers"),
        ({**DOLA, "layers": ["l0", "nobody"]}, "layers.1"),
        ({**DOLA, "layers": ["l0", "chat"]}, "layers.1"),
        ({**DOLA, "layers": ["base"]}, "layers.0"),
        ({**DOLA, "layers": ["of-chat"]}, "layers.0"),
        ({**DOLA, "layers": ["value"]}, "layers.0"),
        ({**DOLA, "relative_top": 0.0}, "relative_top"),
        ({**DOLA, "relative_top": 1.1}, "relative_top"),
        ({**DOLA, "jsd": 1}, "jsd"),
        ({**DOLA, "prompts": {"l0": {"prompt": "x"}}}, "prompts.l0"),
    )


class TestSled(MethodConformance):
    method = Sled()
    streams, taps = TAPPED["streams"], TAPPED["taps"]
    configs = (
        SLED,
        {**SLED, "rate": 0.5, "top_k": 1},
        {**SLED, "layers": ["l2"], "top_k": 128, "report": True},
    )
    zero_config = None
    bad_configs = (
        ({**SLED, "layers": []}, "layers"),
        ({**SLED, "layers": ["chat"]}, "layers.0"),
        ({**SLED, "rate": 0.0}, "rate"),
        ({**SLED, "rate": NAN}, "rate"),
        ({**SLED, "rate": 10.5}, "rate"),
        ({**SLED, "top_k": 0}, "top_k"),
        ({**SLED, "top_k": 129}, "top_k"),
        ({**SLED, "top_k": 2.0}, "top_k"),
    )


class TestCriticalTokens(MethodConformance):
    method = CriticalTokens()
    streams = {**MethodConformance.streams, "critic": "classifier"}
    configs = (
        CRITICAL,
        {**CRITICAL, "threshold": 0.0},
        {**CRITICAL, "threshold": 1.0},
        {**CRITICAL, "mode": "soft", "report": "tokens"},
        {**CRITICAL, "aligned": "chat", "mode": "soft"},
        {**CRITICAL, "aligned": "chat", "pretrained": "base", "threshold": 0.1},
    )
    zero_config = None
    bad_configs = (
        ({**CRITICAL, "threshold": 1.1}, "threshold"),
        ({**CRITICAL, "threshold": -0.1}, "threshold"),
        ({**CRITICAL, "threshold": NAN}, "threshold"),
        ({**CRITICAL, "threshold": INF}, "threshold"),
        ({**CRITICAL, "threshold": "0.5"}, "threshold"),
        ({**CRITICAL, "pretrained": "base"}, "pretrained"),
        ({**CRITICAL, "pretrained": "nobody"}, "pretrained"),
        ({**CRITICAL, "pretrained": "value"}, "pretrained"),
        ({**CRITICAL, "aligned": "critic"}, "aligned"),
        ({**CRITICAL, "classifier": "chat"}, "classifier"),
        ({**CRITICAL, "classifier": "plain"}, "classifier"),
        ({**CRITICAL, "classifier": "base"}, "classifier"),
        ({**CRITICAL, "classifier": "value"}, "classifier"),
        ({**CRITICAL, "classifier": "nobody"}, "classifier"),
        ({**CRITICAL, "mode": "medium"}, "mode"),
        ({"method": "critical_tokens", "pretrained": "plain"}, "classifier"),
    )


SELECT = {"method": "select", "second": "plain"}
BY_HEAD = {**SELECT, "gate": "classifier", "classifier": "critic"}
DOUBT = {**SELECT, "gate": "confidence"}


class TestSelect(MethodConformance):
    method = Select()
    streams = {**MethodConformance.streams, "critic": "classifier"}
    configs = (
        {**SELECT, "gate": "constant"},
        {**SELECT, "gate": "constant", "share": 0.9, "first": "chat", "mode": "soft"},
        {**SELECT, "gate": "constant", "share": 1},
        BY_HEAD,
        {**BY_HEAD, "threshold": 0.0, "greedy": True},
        {**BY_HEAD, "mode": "soft"},
        {**BY_HEAD, "mode": "soft", "threshold": 0.4, "ends": "first"},
        DOUBT,
        {**DOUBT, "threshold": 0.9, "ends": "second"},
        {**DOUBT, "mode": "soft"},
        {**DOUBT, "mode": "soft", "threshold": 0.6, "first": "chat", "second": "base"},
    )
    zero_config = {**SELECT, "gate": "constant", "share": 0}
    bad_configs = (
        (SELECT, "gate"),
        ({**SELECT, "gate": "random"}, "gate"),
        ({**SELECT, "gate": "constant", "mode": "hard"}, "mode"),
        ({**SELECT, "gate": "constant", "share": 1.2}, "share"),
        ({**SELECT, "gate": "constant", "threshold": 0.5}, "threshold"),
        ({**DOUBT, "share": 0.5}, "share"),
        ({**DOUBT, "classifier": "critic"}, "classifier"),
        ({**DOUBT, "mode": "soft", "ends": "second"}, "ends"),
        ({**DOUBT, "mode": "soft", "greedy": True}, "greedy"),
        ({**DOUBT, "threshold": -0.1}, "threshold"),
        ({**DOUBT, "second": "base"}, "second"),
        ({**DOUBT, "second": "critic"}, "second"),
        ({**SELECT, "gate": "classifier"}, ""),
        ({**BY_HEAD, "classifier": "chat"}, "classifier"),
    )


SAFE = {"method": "safe_decoding", "expert": "twin"}


class TestSafeDecoding(MethodConformance):
    method = SafeDecoding()
    configs = (
        SAFE,
        {**SAFE, "strength": 0.5, "tokens": 1},
        {**SAFE, "shared": 1, "expert": "chat"},
    )
    zero_config = {**SAFE, "strength": 0}
    bad_configs = (
        ({**SAFE, "expert": "base"}, "expert"),
        ({**SAFE, "expert": "value"}, "expert"),
        ({**SAFE, "tokens": 0}, "tokens"),
        ({**SAFE, "shared": 0}, "shared"),
        ({**SAFE, "shared": 65}, "shared"),
        ({**SAFE, "strength": -1}, "strength"),
        ({**SAFE, "phases": [{"first": 3, "strength": 11}]}, "phases.0.strength"),
    )


class TestValueAugmented(MethodConformance):
    method = ValueAugmented()
    streams = {**MethodConformance.streams, "kind": "value"}
    configs = (
        VALUE,
        {**VALUE, "top_k": 1},
        {**VALUE, "mask": True, "centre": False},
        {**VALUE, "transform": "log_sigmoid", "mask": True, "top_k": 5},
        {**VALUE, "transform": "clip", "centre": False},
        {**VALUE, "top_k": 64, "eos_value": "model", "report": "tokens"},
        {**VALUE, "values": [*VALUE["values"], {"stream": "kind", "strength": 0.5}], "top_k": 5},
        {**VALUE, "values": [*VALUE["values"], {"stream": "kind", "strength": 0}]},
    )
    zero_config = {**VALUE, "values": [{"stream": "value", "strength": 0}]}
    bad_configs = (
        ({**VALUE, "top_k": 0}, "top_k"),
        ({**VALUE, "top_k": 65}, "top_k"),
        ({**VALUE, "top_k": 2.0}, "top_k"),
        ({**VALUE, "eos_value": "none"}, "eos_value"),
        ({**VALUE, "values": []}, "values"),
        ({**VALUE, "values": [*VALUE["values"], *VALUE["values"]]}, "values"),
        ({**VALUE, "values": [{"stream": "chat"}]}, "values.0.stream"),
        ({**VALUE, "values": [{"stream": "nobody"}]}, "values.0.stream"),
        ({**VALUE, "values": [{"stream": "value", "strength": INF}]}, "values.0.strength"),
        ({**VALUE, "values": [{"stream": "value", "strength": -1}]}, "values.0.strength"),
        ({**VALUE, "values": [{"stream": "value", "strength": 11}]}, "values.0.strength"),
        ({"method": "value_augmented"}, "values"),
    )


class TestBestOfN(MethodConformance):
    method = BestOfN()
    streams = {**MethodConformance.streams, "critic": "classifier"}
    configs = (
        BEST,
        {**BEST, "n": 1},
        {**BEST, "n": 64, "value": "critic", "report": "tokens"},
        {**BEST, "prompts": {"value": {"prompt": "Hello"}}},
    )
    zero_config = None
    bad_configs = (
        ({**BEST, "n": 0}, "n"),
        ({**BEST, "n": -1}, "n"),
        ({**BEST, "n": 65}, "n"),
        ({**BEST, "n": 2.0}, "n"),
        ({**BEST, "n": "2"}, "n"),
        ({**BEST, "n": True}, "n"),
        ({**BEST, "n": None}, "n"),
        ({**BEST, "value": "chat"}, "value"),
        ({**BEST, "value": "base"}, "value"),
        ({**BEST, "value": "nobody"}, "value"),
        ({**BEST, "value": ["value"]}, "value"),
        ({**BEST, "prompts": {"chat": {"prompt": "a"}}}, "prompts.chat"),
        ({"method": "best_of_n"}, "value"),
    )


class TestGuidedSearch(MethodConformance):
    method = GuidedSearch()
    streams = {**MethodConformance.streams, "critic": "classifier"}
    configs = (
        SEARCH,
        {**SEARCH, "k": 8, "beams": 4, "score": RATIO, "block": {"tokens": 10}},
        {**SEARCH, "draw": "chat", "k": 1, "accept": {"at_least": 0.7}, "report": "tokens"},
        {**SEARCH, "draw": {"base": 1, "chat": 0.5, "plain": -0.5}, "block": {"until": ".\n"}},
        {**SEARCH, "choose": "sample", "score": {"value": "critic", "scale": "probability",
                                                 "weight": -20.0, **RATIO}},
        {**SEARCH, "draw": "chat", "choose": "sample", "beta": 0.5, "accept": {"at_least": -3},
         "fallback": {"k": 4, "score": {"value": "value"}}},
    )  # fmt: skip
    zero_config = None
    bad_configs = (
        ({**SEARCH, "k": 0}, "k"),
        ({**SEARCH, "k": 65}, "k"),
        ({**SEARCH, "k": 16, "beams": 5}, "beams"),
        ({**SEARCH, "draw": "nobody"}, "draw"),
        ({**SEARCH, "draw": {"nobody": 1.0}}, "draw.nobody"),
        ({**SEARCH, "draw": {"chat": INF}}, "draw.chat"),
        ({**SEARCH, "draw": {}}, "draw"),
        ({**SEARCH, "block": {"tokens": None}}, "block.until"),
        ({**SEARCH, "block": {"until": ""}}, "block.until"),
        ({**SEARCH, "score": {"value": "chat"}}, "score.value"),
        ({**SEARCH, "score": {"value": "value", "weight": NAN}}, "score.weight"),
        ({**SEARCH, "score": {"log_ratio": {"of": "value", "to": "chat"}}}, "score.log_ratio.of"),
        ({**SEARCH, "score": {"value": "value", "scale": "odds"}}, "score.scale"),
        ({**SEARCH, "beta": 1.0}, "beta"),
        ({**SEARCH, "accept": {"at_least": 0}, "beams": 2}, "accept"),
        ({**SEARCH, "fallback": {}}, "fallback"),
        ({**SEARCH, "accept": {}}, "accept.at_least"),
        ({"method": "guided_search"}, "score"),
    )


class TestEmulatedFineTuning(MethodConformance):
    method = EmulatedFineTuning()
    configs = (
        SCALE,
        {**SCALE, "strength": 0},
        {**SCALE, "strength": 1.7},
        {**SCALE, "delta_top_p": 0.95},
        {**SCALE, "delta_top_p": 0.3, "strength": 2.0},
        {**SCALE, "delta_top_p": 1.0},
        {**SCALE, "delta_top_p": None},
        REWARDS,
        {**REWARDS, "rewards": [*REWARDS["rewards"], {"tuned": "chat", "weight": -0.2}]},
        {**REWARDS, "reference": "base"},
    )
    zero_config = None
    bad_configs = (
        ({**SCALE, "delta_top_p": 0}, "delta_top_p"),
        ({**SCALE, "delta_top_p": 1.01}, "delta_top_p"),
        ({**SCALE, "strength": -1}, "strength"),
        ({**SCALE, "tuned": "plain"}, "tuned"),
        ({**SCALE, "tuned": "base"}, "tuned"),
        ({**SCALE, "reference": "base"}, "tuned"),
        ({**REWARDS, "tuned": "chat"}, "tuned"),
        ({**REWARDS, "strength": 0.5}, "strength"),
        ({**REWARDS, "delta_top_p": 0.9}, "delta_top_p"),
        ({**REWARDS, "rewards": []}, "rewards"),
        ({**REWARDS, "rewards": [{"tuned": "plain", "weight": 1}]}, "rewards"),
        ({**REWARDS, "rewards": [{"tuned": "chat", "weight": INF}]}, "rewards.0.weight"),
        ({**REWARDS, "rewards": [{"tuned": "chat", "weight": -11}]}, "rewards.0.weight"),
        ({**REWARDS, "rewards": [{"tuned": "nobody", "weight": 1}]}, "rewards.0.tuned"),
        ({"method": "emulated_fine_tuning", "reference": "plain"}, "tuned"),
        ({"method": "emulated_fine_tuning", "tuned": "chat"}, "reference"),
    )


class TestContrastive(MethodConformance):
    method = Contrastive()
    configs = (
        CONTRAST,
        {**CONTRAST, "strength": 3.0, "plausibility": 0.01},
        {**CONTRAST, "plausibility": 1.0},
    )
    zero_config = {**CONTRAST, "strength": 0, "plausibility": 0.5}
    bad_configs = (
        ({**CONTRAST, "plausibility": 0}, "plausibility"),
        ({**CONTRAST, "plausibility": 1.5}, "plausibility"),
        ({**CONTRAST, "plausibility": NAN}, "plausibility"),
        ({**CONTRAST, "amateur": "base"}, "amateur"),
    )


class TestMix(MethodConformance):
    method = Mix()
    configs = (
        {"method": "mix", "weights": {"base": 1.0, "chat": 0.6, "plain": -0.6}},
        {"method": "mix", "weights": {"chat": 1}},
        {"method": "mix", "weights": {"base": 0, "chat": 0.5, "plain": 0.5, "twin": 0.0}},
        {"method": "mix", "weights": {"base": 0.2, "chat": 0.8}, "top_k": 10},
        {
            "method": "mix",
            "weights": {"base": 1, "plain": -0.8},
            "top_share": 0.1,
            "plausibility": 0.1,
        },
        {
            "method": "mix",
            "weights": {"base": 1, "chat": -0.5},
            "plausibility": 0.3,
            "judge": "chat",
        },
        {"method": "mix", "weights": {"base": 1, "chat": -0.5}, "top_share": 1},
    )
    zero_config = {"method": "mix", "weights": {"base": 1.0}}
    bad_configs = (
        ({"method": "mix", "weights": {}}, "weights"),
        ({"method": "mix", "weights": {"base": 0, "chat": 0.0}}, "weights"),
        ({"method": "mix", "weights": {"base": 1, "chat": 10.5}}, "weights.chat"),
        ({"method": "mix", "weights": {"base": 1, "chat": NAN}}, "weights.chat"),
        ({"method": "mix", "weights": {"base": 1, "chat": True}}, "weights.chat"),
        ({"method": "mix", "weights": {"base": 1, "nobody": 1}}, "weights.nobody"),
        ({"method": "mix", "weights": {"base": 1, "value": 1}}, "weights.value"),
        ({"method": "mix"}, "weights"),
        ({"method": "mix", "weights": {"base": 1}, "top_k": 0}, "top_k"),
        ({"method": "mix", "weights": {"base": 1}, "top_k": 3, "top_share": 0.1}, "top_share"),
        ({"method": "mix", "weights": {"base": 1}, "top_k": 3, "judge": "chat"}, "judge"),
        ({"method": "mix", "weights": {"chat": 1}, "top_k": 3}, "judge"),
    )


class TestContextAware(MethodConformance):
    method = ContextAware()
    configs = (
        CONTEXT,
        {**CONTEXT, "strength": 1, "prompts": {"twin": {"messages": [{"role": "user"}]}}},
    )
    zero_config = {**CONTEXT, "strength": 0, "prompts": {"twin": {"prompt": "Who?"}}}
    bad_configs = (
        ({**CONTEXT, "without": "base"}, "without"),
        ({**CONTEXT, "strength": 11}, "strength"),
        ({**CONTEXT, "prompts": {"base": {"prompt": "x"}}}, "prompts.base"),
        ({**CONTEXT, "prompts": {"chat": {"prompt": "x"}}}, "prompts.chat"),
        ({**CONTEXT, "prompts": {"nobody": {"prompt": "x"}}}, "prompts.nobody"),
        ({**CONTEXT, "prompts": {"twin": {}}}, "prompts.twin"),
        ({**CONTEXT, "prompts": {"twin": {"token_ids": [3, -1]}}}, "prompts.twin.token_ids.1"),
        ({**CONTEXT, "prompts": {"twin": {"token_ids": []}}}, "prompts.twin.token_ids"),
    )


class TestGuidance(MethodConformance):
    method = Guidance()
    configs = (GUIDE, {**GUIDE, "strength": 0}, {**GUIDE, "strength": 1}, {**GUIDE, "strength": 7})
    zero_config = None
    bad_configs = (
        ({**GUIDE, "negative": "base"}, "negative"),
        ({**GUIDE, "strength": INF}, "strength"),
    )


def recipe(spec: dict[str, Any]) -> Recipe:
    method = METHODS[spec["method"]]
    snapshot = Snapshot(STREAMS)
    return method.resolve(parse(spec, method, snapshot, Limits()), snapshot)


def logits(seed: int, size: int = 50) -> dict[str, Logits]:
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 3, size) for name in STREAMS}


def distribution(spec: dict[str, Any], scores: dict[str, Logits]) -> Logits:
    return np.exp(log_softmax(mix_reference(recipe(spec), scores)))


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ({**PROXY, "strength": 0.8}, {"base": 1.0, "chat": 0.8, "plain": -0.8}),
        ({**SCALE, "strength": 0.8}, {"base": 0.8, "chat": 1.0, "plain": -0.8}),
        (REWARDS, {"base": 1.0, "chat": 0.7, "twin": 0.3, "plain": -1.0}),
        (CONTEXT, {"base": 1.5, "twin": -0.5}),
        (GUIDE, {"base": 1.5, "twin": -0.5}),
    ],
)
def test_weights_are_those_of_the_formula(spec: dict[str, Any], weights: dict[str, float]) -> None:
    assert recipe(spec).weights == pytest.approx(weights)
    assert recipe(spec).rule == Rule()


def test_contrastive_adds_the_mask_of_its_paper() -> None:
    assert recipe(CONTRAST) == Recipe(
        {"base": 1.5, "plain": -0.5}, Rule(RuleKind.PLAUSIBLE, "base", 0.1)
    )


def test_delta_filter_reads_the_tuned_streams_nucleus() -> None:
    assert recipe({**SCALE, "delta_top_p": 0.95}).rule == Rule(RuleKind.NUCLEUS, "chat", 0.95)


@given(st.integers(0, 2**32))
def test_up_scaling_at_strength_one_is_proxy_tuning(seed: int) -> None:
    assert recipe(SCALE).weights == recipe(PROXY).weights
    scores = logits(seed)
    assert distribution(SCALE, scores) == pytest.approx(distribution(PROXY, scores))


@given(st.integers(0, 2**32))
def test_a_filter_that_keeps_everything_changes_nothing(seed: int) -> None:
    scores = logits(seed)
    everything = distribution({**SCALE, "delta_top_p": 1.0, "strength": 2.0}, scores)
    assert everything == pytest.approx(distribution({**SCALE, "strength": 2.0}, scores))


@given(st.integers(0, 2**32))
def test_outside_the_nucleus_the_tuned_model_speaks_alone(seed: int) -> None:
    scores = logits(seed)
    z = mix_reference(recipe({**SCALE, "delta_top_p": 0.5}), scores)
    likely = np.sort(np.exp(log_softmax(scores["chat"])))[::-1]
    kept = int(np.searchsorted(np.cumsum(likely), 0.5)) + 1
    outside = np.argsort(-scores["chat"])[kept:]
    assert z[outside] == pytest.approx(scores["chat"][outside])


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_mixed_rewards_whose_weights_sum_to_one_forget_the_reference(
    seed: int, share: float
) -> None:
    # With the reference as the base, mixing rewards is multi-objective decoding.
    rewards = [{"tuned": "chat", "weight": share}, {"tuned": "twin", "weight": 1 - share}]
    mixed = distribution({**REWARDS, "rewards": rewards, "reference": "base"}, logits(seed))
    plain = {"method": "mix", "weights": {"chat": share, "twin": 1 - share}}
    assert mixed == pytest.approx(distribution(plain, logits(seed)))


@given(st.integers(0, 2**32))
def test_mixing_equal_streams_with_weights_that_sum_to_one_changes_nothing(seed: int) -> None:
    scores = logits(seed)
    scores["chat"] = scores["base"] + 1.5
    half = {"method": "mix", "weights": {"base": 0.5, "chat": 0.5}}
    assert distribution(half, scores) == pytest.approx(np.exp(log_softmax(scores["base"])))


@given(st.integers(0, 2**32))
def test_guidance_at_one_is_the_base_and_at_zero_the_negative_stream(seed: int) -> None:
    scores = logits(seed)
    base, negative = (np.exp(log_softmax(scores[name])) for name in ("base", "twin"))
    assert distribution({**GUIDE, "strength": 1}, scores) == pytest.approx(base)
    assert distribution({**GUIDE, "strength": 0}, scores) == pytest.approx(negative)


@given(st.integers(0, 2**32), st.floats(0.01, 1))
def test_the_base_s_first_choice_is_always_plausible(seed: int, share: float) -> None:
    scores = logits(seed)
    z = mix_reference(recipe({**CONTRAST, "plausibility": share}), scores)
    assert np.isfinite(z[scores["base"].argmax()])


def test_every_built_in_runs_the_kit() -> None:
    assert METHODS.keys() == BUILT_INS.keys() == discover().keys()
    kits = [kit for kit in globals().values() if isinstance(kit, type)]
    tested = {
        kit.method.name
        for kit in kits
        if issubclass(kit, MethodConformance) and kit.__dict__.get("method")
    }
    assert tested == METHODS.keys()
