"""Strangers' expressions: the same answers as Python's, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.formats.patterns import Budget, Pattern, PatternError
from tests.tiers import examples

_ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c.]", r"\d", r"\w", r"\W", r"\s", "^", "$", r"\b",
     r"\B", r"\A", r"\Z", "(?=a)", "(?!b)", "(?<=a)", "(?<!b.)", "1"]
)  # fmt: skip


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    times = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?", "??"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, times).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda part: f"(?={part})"),
    )


@settings(max_examples=examples(1500))
@given(st.recursive(_ATOMS, _larger, max_leaves=6), st.text("ab.1 \n", max_size=6))
def test_answers_are_pythons(text: str, name: str) -> None:
    pattern = Pattern(text, Budget())
    assert pattern.fullmatch(name) == bool(re.fullmatch(text, name))
    assert pattern.match(name) == bool(re.match(text, name))


LLAMA_FACTORY = r"^(?!.*patch_embed).*(?:q_proj|v_proj).*"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)
PEFT = r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"


@pytest.mark.parametrize("text", [LLAMA_FACTORY, UNSLOTH, PEFT, r".*\.(q|v)_proj"])
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj", "model.patch_embed.q_proj", "decoder.SelfAttention.0.q",
     "model.language_model.layers.31.mlp.k_proj", ""],
)  # fmt: skip
def test_expressions_of_real_trainers(text: str, name: str) -> None:
    assert Pattern(text, Budget()).fullmatch(name) == bool(re.fullmatch(text, name))


@pytest.mark.parametrize(
    "text",
    ["(a+)+b", "((((a*)*)*)*)*b", "(.*)*(.*)*(.*)*x", "(?=(.*)*(.*)*x)(.*)*y", "(?:a?){300}a{300}b",
     "((?:(a*){99999})*){99999}b", "(?:(?=(?:(?=.*z).)*z).)*z", "(a|aa|aaa)*b" * 50],
)  # fmt: skip
def test_hostile_expressions_take_seconds_at_most(text: str) -> None:
    start = time.monotonic()
    budget = Budget()
    try:
        for i in range(500):
            assert not Pattern(text, budget).fullmatch("a" * 250 + str(i))
    except PatternError as error:
        assert "too long" in str(error)  # noqa: PT017
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("text", "says"),
    [(r"(a)\1", "groupref"), ("(?>a)", "atomic_group"), ("a*+", "possessive"), ("(?i)a", "flags"),
     ("(?i:a)", "flags"), ("(", "broken"), ("(?<=a*)b", "broken"),
     ("a{99999999999}", "broken"), ("(" * 3000, "broken"),
     ("(a)(?(1)b|c)", "groupref_exists"), ("a" * 10_001, "longer")],
)  # fmt: skip
def test_what_is_not_taken_is_refused(text: str, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        Pattern(text, Budget())
