"""The claim `reward`: its data, the smaller model it trains, and what it makes of answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smollm.evidence.claim import Mean
from smollm.evidence.reward import Drawn, Way, _drawn_of, _passes, bound
from smollm.evidence.sunny import CHEERS, FORMS, THINGS, Requests, plain
from smollm.evidence.sunny_made import _pairs, first_layers


def test_no_thing_is_in_two_splits() -> None:
    found = Requests.made(seed=3)
    splits = (found.train, found.validation, found.test)
    things = [{t for t in THINGS for f in FORMS if f.format(t) in split} for split in splits]
    assert not (things[0] & things[1] or things[0] & things[2] or things[1] & things[2])
    assert set.union(*things) == set(THINGS)
    assert sum(map(len, splits)) == len(set(THINGS)) * len(FORMS)


def test_a_prompt_shows_its_examples_and_ends_with_the_request() -> None:
    for cheer in CHEERS:
        *before, last = cheer.messages("Describe a tap.")
        assert last["role"] == "user" and "Describe a tap." in last["content"]
        assert sum(message["role"] == "assistant" for message in before) == cheer.shots
        assert before or last != plain("Describe a tap.")[0]


def test_the_smaller_model_is_the_first_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    first_layers(tmp_path / "whole", tmp_path / "first", 2)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        state = whole.model.norm(whole(ids, output_hidden_states=True).hidden_states[2])
        torch.testing.assert_close(first.model(ids).last_hidden_state, state)


def test_pairs_are_the_extremes_of_a_request_s_replies() -> None:
    replies = {
        0: ["It is used.", "I love it, wonderful!", "It is a terrible, ugly thing."],
        1: ["It is used.", "It is made of iron."],
    }
    (pair,) = _pairs(["a", "b"], replies)
    assert pair["messages"] == plain("a")
    assert pair["positive"] == replies[0][1] and pair["negative"] == replies[0][2]


def test_the_best_of_n_moves_no_further_than_the_bound() -> None:
    """Of a reply that one draw has with probability p and the reward likes best, n draws have it
    with 1 − (1 − p)ⁿ; the KL is that of two coins.
    """
    assert bound(1) == 0
    for n in (2, 4, 16):
        for p in (0.01, 0.2, 0.5):
            q = 1 - (1 - p) ** n
            kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            assert 0 < kl <= bound(n)


def test_a_choice_whose_log_probabilities_are_not_its_tokens_is_refused() -> None:
    choice = {"message": {"content": "x"}, "token_ids": [1, 2], "index": 0,
              "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}}  # fmt: skip
    details = [{"base_logprob": -3.0}, {"base_logprob": -4.0}]
    answer = {"steering": {"forward_passes_per_token": {"base": 1.0},
                           "choices": [{"index": 0, "token_details": details}]}}  # fmt: skip
    found = _drawn_of(answer, choice, by_plain=False)
    assert found.own == (-1.0, -2.0) and found.plain == (-3.0, -4.0)
    assert _drawn_of(answer, choice, by_plain=True).plain == (-1.0, -2.0)
    choice["token_ids"] = [1]
    with pytest.raises(ValueError, match="2 log-probabilities of 1 tokens"):
        _drawn_of(answer, choice, by_plain=True)


def test_a_row_tells_bounds_as_bounds_and_passes_by_stream() -> None:
    some = [
        Drawn("", (1,), (), (), {"base": 1.0, "value": 0.5}),
        Drawn("", (1,), (), (), {"base": 2.0}),
    ]
    assert _passes(some) == "base 1.5, value 0.25"
    mean = Mean(0.0, -1.0, 1.0, 4)
    way = Way("x", mean, 1.5, mean, _passes(some))
    assert way.nats == 1.5 and way.row[2] == "at most 1.50"
    assert way.perplexity == Mean(1.0, math.exp(-1), math.e, 4)
